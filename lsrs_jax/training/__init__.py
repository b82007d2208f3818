"""Training a split classifier under the noise it will be certified with."""
