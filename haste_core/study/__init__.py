"""The study around the core: settings, data, scores, claims, report and command line."""

import os

# Jobs share the cores of a machine, and small networks are slower on more threads than one. A job that may have more
# says so (`train.threads`, the Snakefile); this holds for every other way in, such as a notebook in JupyterLab.
os.environ.setdefault("OMP_NUM_THREADS", "1")
