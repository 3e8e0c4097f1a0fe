"""Runs the methods on recorded inputs and outputs of the authors' own functions.

`python -m tests.golden FOLDER` checks every case of every method in FOLDER, or of the one method that FOLDER
is named after.
"""
