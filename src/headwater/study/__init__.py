"""The experiment as one object: arms over one label pool as a graph of nodes, executed, billed and compared."""
