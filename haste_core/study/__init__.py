"""The study around the core: settings, data, scores, claims, report and command line."""

import os

# As in the study's jobs, which share the cores: one thread each unless `train.threads` says more. This holds for every
# other way in, such as a notebook; set before the libraries that read it are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
