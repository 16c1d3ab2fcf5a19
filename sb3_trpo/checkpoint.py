"""Reading saved models."""

import io
import json
import pathlib
import zipfile

from stable_baselines3.common.save_util import open_path


def saved_attributes(path: str | pathlib.Path | io.BufferedIOBase) -> set[str]:
    """
    Names of the attributes in a saved model. Nothing is unpickled.

    :param path: file, with or without ``.zip``, or file object (rewound afterwards)
    :return: the names
    """
    file = open_path(path, "r", verbose=0, suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            return set(json.loads(archive.read("data")))
    finally:
        if file is path:
            file.seek(0)
        else:
            file.close()
