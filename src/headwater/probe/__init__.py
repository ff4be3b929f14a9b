"""Before labels are spent: what a pair of models can do, and where its labels should go (docs/probe.md)."""
