"""Start a command from trained weights: its configuration takes over their network and preprocessing."""

import logging
from collections.abc import Collection
from dataclasses import asdict

from jsonargparse import Namespace

from scalablevit_pl.models import ImageClassifier
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.run_folder import differences
from scalablevit_pl.weights.checkpoint import TrainedClassifier
from scalablevit_pl.weights.source import adopt_network

logger = logging.getLogger(__name__)

DEFAULTS = asdict(Preprocessing())


def adopt_weights(
    config: Namespace, trained: TrainedClassifier, weights: str, command: str, named: Collection[str]
) -> None:
    """Change a configuration so that it builds the network of the weights and uses their preprocessing.

    Args:
        config: Configuration of the command; changed in place.
        trained: The weights.
        weights: Their name, for messages.
        command: The command; `fit` alone may use another image size.
        named: Fields of the preprocessing that options on the command line set.

    Raises:
        ValueError: If the configuration asks for something else.
    """
    if not isinstance(trained.network, ImageClassifier):
        kind = type(trained.network).__name__
        raise ValueError(f"--weights starts ScalableViT classifiers, but {weights!r} holds a {kind}")
    section = config.get("model.init_args.network")
    section = section.as_dict() if isinstance(section, Namespace) else {}
    adopted = adopt_network(section, trained.network.config)
    # The description of the network stays a dictionary, as it is one argument of a function.
    arguments = Namespace(**adopted["init_args"])  # type: ignore[no-untyped-call]
    config["model.init_args.network"] = Namespace(  # type: ignore[no-untyped-call]
        class_path=adopted["class_path"], init_args=arguments
    )
    stored = asdict(trained.preprocessing)
    given = config.get("data.init_args.preprocessing")
    given = stored if given is None else asdict(Preprocessing(**given.as_dict()))
    if named:  # the parser adds defaults to the fields that options set: use the weights' values instead
        given = {key: given[key] if key in named or given[key] != DEFAULTS[key] else stored[key] for key in given}
    config["data.init_args.preprocessing"] = Namespace(**given)  # type: ignore[no-untyped-call]
    differing = differences(stored, given, "preprocessing")
    # The network takes images of any size, so a fit may choose another one.
    sizes = ("preprocessing.input_size ", "preprocessing.crop_pct ")
    wrong = [line for line in differing if command != "fit" or not line.startswith(sizes)]
    if wrong:
        raise ValueError(
            f"the weights were trained on other images: {'; '.join(wrong)}: remove --data.preprocessing, or set it to "
            "their values"
        )
    for line in differing:
        logger.info("%s, as this run says", line)
