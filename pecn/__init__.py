"""The method: models, encoding, training, sampling, scoring. All but pecn/sampling_options.py load torch."""
