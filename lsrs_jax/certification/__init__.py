"""From a trained classifier to a folder of certificates, one file per kind of certificate."""
