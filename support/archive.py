"""torch.export archives of feature networks: write them, and read them without unpickling anything."""

import io
import json
import re
import zipfile

import torch

from support import files

CLASSES = "classes.json"                            # extra file: the list of a classifier's class names
# The members that torch.export.save writes for a program that holds nothing but tensors.
MEMBERS = re.compile(
    r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)"
    r"|sample_inputs/model\.pt)|models/model\.json|archive_format|archive_version|byteorder|\.data/\w+"
    rf"|extra/{re.escape(CLASSES)}"
)


def save(net, path, size, classes=None):
    """Export a network of images, uint8 [N, 3, size, size], for metrics.exported; with its class names, if any."""
    example, batch = torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.export.Dim("batch", min=1)
    net = net.cpu().eval().to(memory_format=torch.contiguous_format)        # the save warns about other formats
    program = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:                # stack traces hold the paths of this machine
        node.meta.pop("stack_trace", None)
    names = {CLASSES: json.dumps(classes)}          # so that class accuracy is measured on these only
    files.write(path, lambda file: torch.export.save(program, file, extra_files=names))


def without_pickles(content):
    """A copy of the archive in which torch.export.load finds nothing to unpickle; load it instead of the original.

    torch.export.load unpickles in half a dozen places (objects among the constants, members of older formats, compiled
    code). So this copies known members and entries only, instead of searching for bad ones.

    Raises:
        ValueError: the archive holds anything else.
    """
    members = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            member = name.partition("/")[2]
            if not MEMBERS.fullmatch(member):
                raise ValueError(f"{name} in it is not what torch >= 2.9 saves of a program and its tensors")
            members[member] = archive.read(name)
    for kind in ("weights", "constants"):
        for entry in json.loads(members[f"data/{kind}/model_{kind}_config.json"])["config"].values():
            if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise ValueError("it holds pickled objects")
    torch.load(io.BytesIO(members["data/sample_inputs/model.pt"]), weights_only=True)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for member, data in members.items():
            archive.writestr(f"archive/{member}", data)
    copy.seek(0)
    return copy
