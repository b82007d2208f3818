"""Constants of the on-disk format and of the random streams behind the stored counts.

Everything here is marked ``on-disk format``. Changing a value would make stored files unreadable, or make a resumed run
draw other noise than its first half. A change therefore needs a new `FORMAT` and code that still reads the old files. A
test pins every value and the noise that follows from the values.
"""

# Format number of config.json, certificates.json and audit.json. Files without a number are of format 0.
# Since format 2 every row of a ledger names its run, and radii of near-ties are rounded down further.
FORMAT = 2  # on-disk format

# Key of a random stream: fold_in(fold_in(key(seed), domain), stream). The domain of certification is a large arbitrary
# number: other programs fold small numbers (an epoch, a step) into the key of the same seed, and no key may be shared.
PRNG = "threefry2x32"  # on-disk format
KEY_DOMAINS = {"init": 1, "train": 2, "evaluate": 3, "certify": 0xE35A18C7, "probe": 5, "audit": 6}  # on-disk format
STREAMS = {"selection": 1, "estimation": 2, "prediction": 3}  # on-disk format
# The offset is added to the number of a stream, so that the two kinds of noise never use the same key. The noise of
# block b has the key fold_in(stream key, b) if images share it, else fold_in(fold_in(stream key, image index), b).
NOISE_OFFSETS = {"shared": 0, "independent": 16}  # on-disk format

# Looks of the staged schedule: FIRST_LOOK samples, then LOOK_GROWTH times as many each time, in whole sample blocks.
FIRST_LOOK, LOOK_GROWTH = 1000, 1.3  # on-disk format
# Those of the anytime schedule, whose looks cost no part of alpha.
ANYTIME_FIRST_LOOK, ANYTIME_LOOK_GROWTH = 100, 1.1  # on-disk format

# Sampling of the rounded Gaussian: 64 uniform bits choose a column of the alias table, a threshold and a sign.
COLUMN_BITS, THRESHOLD_BITS = 18, 45  # on-disk format
GRID_BITS = 15  # on-disk format; the grid spacing q is the power of two with 2**14 <= sigma/q < 2**15

LEDGER_COLUMNS = {  # by the format in which a folder was begun; on-disk format
    1: ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "crc"),
    2: ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "run", "crc"),
}
FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # of Cohen et al. 2019; on-disk format
AUDIT_COLUMNS = (  # on-disk format
    *("idx", "label", "predict", "radius", "unperturbed"),
    *("pairs", "flips", "undecided", "distance", "attack"),
)
