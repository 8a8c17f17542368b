"""`python -m benchmarks [NAME ...]`: measure, keep the tables, and write the report."""

from __future__ import annotations

import argparse

from benchmarks import attention, cores, growth, machine, pictures, precision, sampling, step
from haste_core.devices import default_device

ALL = {
    "step": (step.measure, 24),
    "compiled": (step.compiled, 24),
    "attention": (attention.measure, 10),
    "sampling": (sampling.measure, 5),
    "precision": (precision.measure, 1),
    "cores": (cores.measure, 10),
    "growth": (growth.measure, 20),
}


def main() -> None:
    """Run the benchmarks that are named, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *ALL], help=f"of {', '.join(ALL)}; all by default")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    arguments = parser.parse_args()
    machine.use_all_cores()
    for name in arguments.names or ALL:
        measure, rounds = ALL[name]
        machine.forget()
        table = measure(arguments.rounds or rounds)
        print(table.to_string(index=False))
        machine.keep(table, name, matrix_rate=machine.matrix_rate(step.sizes()[2], default_device().type))
    print(pictures.write(machine.RESULTS / machine.name()))


if __name__ == "__main__":
    main()
