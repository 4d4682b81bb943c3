"""Distances of images to a dataset: torch-fidelity's metrics, in the features of Inception or of a given network.

    extractor = inception(device)                    # or exported("features.pt2", 32, device)
    real = reference(images, extractor, cache_dir)   # features of a dataset, cached on disk by content
    values = distances(generated, labels, real, extractor)                  # dict: fid, kid, precision, recall, ...
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.export.passes import move_to_device_pass
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from support import archive, files, hardware
from support.data import DataError

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
KID_SUBSET = 1000
FLOOR_DRAWS = 5


class MetricsError(DataError):
    """The feature network cannot be loaded; the message is one line that names the file."""


class Extractor:
    """Features of images.

    Args:
        name: what the Frechet distance in these features is called: "FID" for Inception, else "FD".
        identity: a string that tells these features from others, for the cache.
        network: uint8 [N, 3, H, W] -> (features [N, D], logits [N, K] or None).
        classes: the names of the K classes, None where they are not known.
    """

    def __init__(self, name, identity, network, device, classes=None):
        self.name, self.identity, self.network, self.device, self.classes = name, identity, network, device, classes

    @torch.no_grad()
    def __call__(self, images, batch_size=250):
        """uint8 [N, 3, H, W] -> features float32 [N, D] and logits [N, K] or None, on the CPU."""
        with hardware.full_float32(self.device):     # during training too, as for the cached reference
            parts = [self.network(batch.to(self.device)) for batch in images.split(batch_size)]
        features = torch.cat([features.float().cpu() for features, _ in parts])
        logits = None if parts[0][1] is None else torch.cat([logits.float().cpu() for _, logits in parts])
        return features, logits


def inception(device, path=None):
    """Inception v3 with the reference TensorFlow weights, as torch-fidelity has it: 2048 features, 1008 logits.

    Args:
        path: the weights; None: torch-fidelity's own copy, downloaded on first use to torch.hub's folder.

    Raises:
        MetricsError: the weights are not there and cannot be downloaded, or the file does not hold them.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not file.exists() and path is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix="6726825d", progress=False)
        except Exception as error:                  # urllib raises many types
            raise MetricsError(
                f"the weights of Inception could not be downloaded ({error}): put {URL_INCEPTION_V3} at {file} or "
                "at --inception_weights FILE, or give --feature_extractor FILE.pt2, which tools/features.py makes"
            ) from error
    try:                                            # torch-fidelity would unpickle anything: check first
        torch.load(file, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], str(file)).to(device)
    except Exception as error:
        raise MetricsError(f"{file} does not hold the weights of Inception: {str(error).splitlines()[0]}") from error
    return Extractor("FID", INCEPTION, network, device)


def exported(path, size, device):
    """A feature network saved by torch.export: uint8 [N, 3, H, W] -> features [N, D], or (features, logits [N, K]).

    Args:
        size: height and width H = W of the images.

    Such a file is a program: take it from people you trust. Files with pickled objects inside are refused. The
    names of its classes are those in the member archive.CLASSES, if there is one.

    Raises:
        MetricsError: the file is missing, is not such a program, is for images of another size, or has other outputs.
    """
    try:
        content = Path(path).read_bytes()
        # A program checks that its input is on the device it was exported on, so .to(device) would not be enough.
        extra = {archive.CLASSES: "null"}
        program = torch.export.load(archive.without_pickles(content), extra_files=extra)
        classes = json.loads(extra[archive.CLASSES])
        takes = tuple(program.example_inputs[0][0].shape[1:])
        program = move_to_device_pass(program, torch.empty(0, device=device).device).module()
        for n in 4, 5:                              # two sizes: an N that was fixed at export fails here
            try:
                out = program(torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device))
            except Exception as error:
                reason = f"it takes images {list(takes)}, not {[3, size, size]}"
                raise (error if takes == (3, size, size) else ValueError(reason)) from None
            features, logits = out if isinstance(out, tuple | list) else (out, None)
            if features.ndim != 2 or len(features) != n or (logits is not None and logits.ndim != 2):
                raise ValueError("it does not give features [N, D] or (features, logits [N, K])")
        if classes is not None and (logits is None or len(classes) != logits.shape[1]):
            raise ValueError(f"it names {len(classes)} classes and has not as many logits")
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:                      # any layer of the reader, or the program itself
        raise MetricsError(f"{path} is no feature network of torch.export: {str(error).splitlines()[0]}") from error
    network = program if logits is not None else lambda images: (program(images), None)
    return Extractor("FD", hashlib.sha256(content).hexdigest(), network, device, classes)


def at_most(features, most, seed=0):
    """At most so many of the rows: a random choice, in random order."""
    if most is None or len(features) <= most:
        return features
    return features[np.random.default_rng(seed).permutation(len(features))[:most]]


def summary(features):
    """What the distances need of a set of images: features [N, D], and their mu [D] and sigma [D, D] in float64."""
    return dict(fid_features_to_statistics(features.double()), features=features)


def reference(images, extractor, cache_dir):
    """summary() of a dataset's images, uint8 [N, 3, H, W], read from cache_dir if it was kept there."""
    digest = hashlib.sha256(f"all features, {extractor.identity}".encode())          # older caches held only a subset
    digest.update(images.contiguous().numpy())
    try:
        path = Path(cache_dir).expanduser() / f"{digest.hexdigest()[:32]}.npz"
    except RuntimeError as error:                   # this user has no home
        print(f"note: cannot keep the features in --cache_dir {cache_dir}: {error}", file=sys.stderr)
        return summary(extractor(images)[0])
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file, features=torch.from_numpy(file["features"]))
    except Exception:                               # not there yet, or damaged: made anew
        real = summary(extractor(images)[0])
    try:
        kept = dict(real, features=real["features"].numpy())
        files.write(path, lambda file: np.savez(file, **kept))
    except OSError as error:                        # the measurement matters more than its cached copy
        print(f"note: cannot keep the features in --cache_dir {cache_dir}: {error.strerror}", file=sys.stderr)
    return real


def distances(images, labels, real, extractor, neighbours=None):
    """Metrics of generated images against a reference.

    Args:
        images: uint8 [N, 3, H, W].
        labels: the classes they were generated for, [N], indices of extractor.classes; None if it has other classes.
        real: the dataset's summary().
        neighbours: how many images of each set precision and recall use (their time is quadratic in it); None: all.

    Returns:
        a dict of floats: fid or fd (Frechet distance), precision and recall (in the same features, as in
        guided-diffusion's evaluation; torch-fidelity's own default for these two is VGG); for Inception kid (mean of
        100 subsets; its kernel is made for the scale of those features) and the inception_score; for a classifier's
        logits the class_accuracy.
    """
    features, logits = extractor(images)
    generated = summary(features)
    values = {extractor.name.lower(): fid_statistics_to_metric(generated, real, verbose=False)[KEY_METRIC_FID]}
    one, two = generated["features"], real["features"]
    if extractor.name == "FID":
        subset = min(KID_SUBSET, len(one), len(two))
        kid = kid_features_to_metric(one, two, kid_subset_size=subset, verbose=False)
        values["kid"] = kid["kernel_inception_distance_mean"]
        values["inception_score"] = isc_features_to_metric(logits)["inception_score_mean"]
    elif logits is not None and labels is not None and labels.any():    # not for a single class, whose labels are all 0
        values["class_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    one, two = at_most(one, neighbours), at_most(two, neighbours)
    manifold = prc_features_to_metric(one, two, save_cpu_ram=True, prc_batch_size=2000, verbose=False)
    values.update(precision=manifold["precision"], recall=manifold["recall"])
    return values


def floor(real, labels, n):
    """The Frechet distance between a dataset and n of its images: the error of a covariance estimated from n images.

    Each draw has equally many images of each class, as generated ones have, and none twice where the class has enough:
    it is 0 where a draw takes all of them.

    Args:
        real: the dataset's summary().
        labels: the classes of its images, [N].

    Returns:
        dict(mean, std, draws): over so many draws.
    """
    rng, values = np.random.default_rng(0), []
    rows = [np.flatnonzero(labels.numpy() == label) for label in labels.unique()]
    for _ in range(FLOOR_DRAWS):
        shares = [len(part) for part in np.array_split(np.arange(n), len(rows))]
        drawn = [rng.choice(own, share, replace=share > len(own)) for own, share in zip(rows, shares, strict=True)]
        drawn = summary(real["features"][np.concatenate(drawn)])
        values.append(fid_statistics_to_metric(drawn, real, verbose=False)[KEY_METRIC_FID])
    return dict(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), draws=FLOOR_DRAWS)
