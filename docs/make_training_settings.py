"""Generates `training-settings.md` from `protos/qflare/v1/training.proto`: every setting of a training session.

    python -m docs.make_training_settings

A test fails if the page is out of date.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from qflare.training_settings import leaves, type_name
from qflare.v1 import training_pb2

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "training-settings.md"
MESSAGES: Final = 4
"""Number of the field `message_type` in a FileDescriptorProto; paths of comments consist of such numbers."""
FIELDS: Final = 2
"""Number of the field `field` in a DescriptorProto."""
HEAD: Final = """\
# Settings of a training session

All settings of `qflare.v1.TrainingConfig`, generated from its proto. Every setting is optional. There are four ways to
specify settings; later ones override earlier ones:

```sh
cat > session.toml <<'EOF'
total_rounds = 20
groups = ["ward-2"]

[rounds]
quorum = 3
deadline = "600s"

[strategy]
name = "trimmed_mean"
parameters = { trimmed_fraction = 0.2 }
EOF
```

- a file: `--config session.toml` or `--config session.json`;
- flags for the most common ones: `--rounds 20 --quorum 3 --deadline-s 600`;
- any setting: `--set rounds.quorum=3 --set strategy.parameters.trimmed_fraction=0.2`;
- with gRPC: the field `config` of `AdminService/CreateTrainingSession`.

`--set` accepts seconds for a duration, the name without its prefix for an enum value, comma-separated items for a list
of texts, and JSON for a list of messages:

```sh
qflare-server session validate --name wards --config session.toml --set selection.fraction=0.5 \\
    --set 'release.bounds=[{"metric": "accuracy", "minValue": 0.8}]' --set evaluation.every_rounds=1
```

`session validate` checks the settings and, with `--model`, a model, without creating a session. It prints the
configuration with all defaults. `qflare-admin session validate` runs the check on the coordinator, with its limits.
"""


def page() -> str:
    """Return the text of the page."""
    comments = _comments()
    sections: dict[str, list[tuple[str, FieldDescriptor]]] = {"": []}
    for path, field in leaves():
        sections.setdefault(path.rpartition(".")[0], []).append((path, field))
    parts = [HEAD]
    for section, settings in sections.items():
        about = f"{comments[_owner(section).full_name]}\n\n" if section else ""
        rows = [
            f"| `{path}` | {type_name(field)} | {_cell(comments[field.full_name])} |"
            for path, field in settings
        ]
        table = "\n".join(["| setting | value | meaning |", "|---|---|---|", *rows])
        parts.append(f"## {section or 'General'}\n\n{about}{table}\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _owner(path: str) -> Descriptor:
    """Return the message type at a path."""
    message = training_pb2.TrainingConfig.DESCRIPTOR
    for part in path.split("."):
        found = message.fields_by_name[part].message_type
        assert found is not None
        message = found
    return message


def _comments() -> dict[str, str]:
    """Return the comments of all messages and fields of the file by full name, each as one line."""
    built = subprocess.run(  # noqa: S603 - a program of the development install
        [
            Path(sys.executable).with_name("buf"),
            "build",
            "protos",
            "--as-file-descriptor-set",
            "-o",
            "-",
        ],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = FileDescriptorSet.FromString(built.stdout).file
    file = next(each for each in files if each.name.endswith("training.proto"))
    texts = {
        tuple(place.path): " ".join(place.leading_comments.split())
        for place in file.source_code_info.location
    }
    found = {}
    for number, message in enumerate(file.message_type):
        full_name = f"{file.package}.{message.name}"
        found[full_name] = texts[MESSAGES, number]
        for place, field in enumerate(message.field):
            found[f"{full_name}.{field.name}"] = texts[MESSAGES, number, FIELDS, place]
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
