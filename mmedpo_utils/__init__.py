"""Helpers behind the MMedPO notebooks: clinical-aware preference optimisation of medical
vision-language models.

On the table lies what the notebooks import, in their order:

    profiles         every value of one run, from a commented YAML file
    dataset          films, questions and masks that a profile names
    medklip       01 the visual tool: network, heat map, confidence, pointing game
    noise         02 lesion mask; localized, global and released noise
    relevance     03 judge and panel, the rejected answer, the debate, scores to weights
    pairs      02-03 text pairs, visual pairs, both in one list
    preference_rows  one preference pair on disk: read, check, write
    curate           a profile's pairs on disk, step by step
    lvlm             the Med-LVLM: load, prompt, generate, attention to the image
    trainer       04 loss, batch, log-probabilities, trainer: two rows a pair, nothing clever
    launch        04 start a training from a cell, follow it, stop it
    launch_command   the command that a launch starts
    run_folder       what a run keeps: digest, lock, events, result
    metrics       05 scores of one predictions file
    evaluate      05 a test split: predictions and attention of one model

Rooms hold the rest. The core imports the first four:

    base             files, images, settings, checks, statistics that know nothing of the method
    show             plots, tables and views
    phantom          the drawn world, in which the truth is known
    released         what the authors' released code does where the paper says otherwise
    convert          the door for foreign data sets, DICOM, checkpoints and adapters
    judges           language models as judge and panel
    scale            the fast trainer, restartable curation, several nodes, estimates
    programs         mmedpo NAME: what is started from a terminal
"""

import logging
import os

__version__ = "0.1.0"

# A thread that waits gives its core back. torch's threads would spin, and where other programs use
# the cores, too, everything takes several times as long. It is read when torch is loaded, here or
# in a process that is started from here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On a CPU, bitsandbytes says at import that a kernel for 4-bit matrices is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
