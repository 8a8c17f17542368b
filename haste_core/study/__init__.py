"""The study around the core: settings, data, scores, claims, report and command line."""
