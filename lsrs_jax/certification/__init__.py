"""From a trained classifier to a folder of certificates: sampling, files, verification."""
