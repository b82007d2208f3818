"""Ground floor: errors, files, signals, random keys, processes and devices. Imports no other folder of the package."""
