"""Statistics of reference pictures in an npz, with the names that OpenAI's published ones have.

``mu`` [D] and ``sigma`` [D, D] are of pooled features (FID), ``mu_s`` and ``sigma_s`` of spatial ones (sFID).
The published files also hold the pictures, ``arr_0`` uint8 [N, H, W, 3]; these are neither read nor written
here. The numbers only compare with features of the network that made them.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from glide_fast.evaluation.features import Features
from glide_fast.evaluation.moments import Gaussian
from glide_fast.files import replacing

_SYMMETRY = 1e-4  # of the largest entry; published covariances are float64, some people's float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What a model's samples are compared with; ``spatial`` is for sFID."""

    pooled: Gaussian
    spatial: Gaussian | None = None


def write_reference(path: str | os.PathLike[str], reference: Reference) -> None:
    """Write the statistics, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Read statistics that OpenAI or :func:`write_reference` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz, is damaged, or lacks the statistics.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"reference statistics {name!r} do not exist or are not a file")
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, NpzFile):
            raise ValueError("it is a single array, not an npz")
        with stored:
            pooled = _gaussian(stored, "mu", "sigma")
            spatial = _gaussian(stored, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} & set(stored) else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read reference statistics {name!r}: {error}") from error
    return Reference(pooled=pooled, spatial=spatial)


def _gaussian(stored: Mapping[str, Features], mean_name: str, covariance_name: str) -> Gaussian:
    """The two arrays as float64, when they are there and fit each other."""
    missing = [name for name in (mean_name, covariance_name) if name not in stored]
    if missing:
        pictures = "; compute the features of its pictures, arr_0" if "arr_0" in stored else ""
        raise ValueError(f"it holds {sorted(stored)} but not {missing}{pictures}")
    mean, covariance = (np.asarray(stored[name], dtype=np.float64) for name in (mean_name, covariance_name))
    if mean.ndim != 1 or mean.size == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{mean_name} is {list(mean.shape)} and {covariance_name} {list(covariance.shape)}; "
            "they must be [D >= 1] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mean_name} or {covariance_name} is not finite; compute the statistics again")
    if np.abs(covariance - covariance.T).max() > _SYMMETRY * np.abs(covariance).max():
        raise ValueError(
            f"{covariance_name} is not symmetric, so no covariance; compute the statistics again"
        )
    return Gaussian(mean=mean, covariance=covariance)
