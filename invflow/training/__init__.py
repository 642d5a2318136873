"""Training with Lightning: data, augmentation, runs, comparisons. Needs the ``train`` extra."""
