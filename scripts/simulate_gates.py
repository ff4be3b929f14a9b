"""Error rates of the plateau rule of gates (docs/algorithms.md): how often it ends a stage that still rises, how late
it ends one that does not. `python scripts/simulate_gates.py`; a few seconds a row."""

from __future__ import annotations

import numpy as np

from headwater.methods import Gate
from headwater.monitors.gates import Look, decide

LOOKS, RISE = 24, 12


def simulate(curve: np.ndarray, gate: Gate, runs: int, seed: int = 0) -> np.ndarray:
    """Index of the look that ends each of `runs` stages whose typical problem is right with probability `curve[i]`.

    len(curve) where none did. Problems differ on the logit scale (standard deviation 1.5); every look draws fresh
    samples, which is noisier than the paired streams that real looks share.
    """
    rng = np.random.default_rng(seed)
    ended = np.full(runs, len(curve))
    for run in range(runs):
        skill = rng.normal(0, 1.5, int(gate.problems))
        looks: list[Look] = []
        for i, typical in enumerate(curve):
            right = 1 / (1 + np.exp(-skill) * (1 - typical) / typical)
            looks.append(Look(i, tuple(rng.binomial(gate.samples, right) / gate.samples)))
            if decide(gate, looks):
                ended[run] = i
                break
    return ended


def curve(points: float) -> np.ndarray:
    """Rises by `points` percent a look for 12 looks, then stays."""
    return 0.2 + points / 100 * np.minimum(np.arange(LOOKS), RISE)


def main(runs: int = 400) -> None:
    print("| problems x samples | patience | rise a look | ended while rising | looks after the rise, mean (90 %) |")
    for problems, samples in ((16, 4), (32, 4), (64, 8)):
        for patience in (2, 3, 4):
            gate = Gate(watch="score", every=1, problems=problems, samples=samples, patience=patience)
            for points in (0.0, 2.0, 4.0):
                ended = simulate(curve(points), gate, runs)
                early = float((ended < RISE).mean()) if points else 0.0
                late = ended[ended >= RISE] - RISE if points else ended
                when = f"{late.mean():.1f} ({np.quantile(late, 0.9):.0f})" if len(late) else "-"
                print(f"| {problems} x {samples} | {patience} | {points:g} | {early:.0%} | {when} |", flush=True)


if __name__ == "__main__":
    main()
