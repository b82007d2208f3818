"""From a trained classifier to a folder of certificates: sampling, files, verification."""

OTHER_NAME = "use another --config.certify.name"  # what to do where a folder cannot be continued
