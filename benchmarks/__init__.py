"""Measured costs on this machine: `make bench`, or `python -m benchmarks step attention sampling cores growth`.

Ratios are taken in turns in one process (`study.cost.interleaved`), medians with a 95 % bootstrap interval. Each
benchmark writes `results/<machine>/<name>.csv` and `<name>.json` with the commit, versions and machine; `pictures`
draws them. No test waits for a time: tests hold that two ways agree, benchmarks what each of them costs.
"""
