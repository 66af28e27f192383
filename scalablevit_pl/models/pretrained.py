"""Load, save and share networks, and run them on images: the base of the networks of all tasks."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from scalablevit_pl.models.backbone import prefix_patterns
from scalablevit_pl.models.loading import LoadOptions, build_module, load_tensors, matching_tensors, read_pretrained

if TYPE_CHECKING:  # `import scalablevit_pl.models` needs only torch; other imports are where they are used
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from scalablevit_pl.weights.card import CardSubject
    from scalablevit_pl.weights.stored import Description, StoredModel

    ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor

logger = logging.getLogger(__name__)

COST_SIZE = 512  # side in pixels for which multiply-adds are stated where the preprocessing has no fixed size


class PretrainedNetwork(nn.Module):
    """A network of a task: a `backbone`, a head, and what it takes to load, save, share and use it.

    A subclass sets `task`, builds `backbone` and `head`, and sets `config`, plain values from which `from_config`
    builds the same network: by default its constructor's arguments. Weights are named `backbone.*` and `head.*`.

    Attributes:
        task: The Hub's name of the task, such as `semantic-segmentation`; a class attribute.
        last_layers: Names of the modules that are replaced for another number of classes, such as `("head.fc",)`.
        usage: Line of Python that uses a loaded `model`, for its card; a class attribute.
        config: Plain values that describe the network.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        class_names: Names of the classes, or None if unknown.
        multi_label: Whether an image has any number of classes; a task sets it.
        preprocessing: Transform of the images, or None if unknown.
    """

    task: ClassVar[str]
    last_layers: tuple[str, ...]
    usage: ClassVar[str] = 'model.predict("photo.jpg")'
    backbone: Any
    config: dict[str, Any]
    num_classes: int
    in_chans: int = 3
    class_names: list[str] | None = None
    multi_label: bool = False
    preprocessing: Any = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network that a `config` describes, randomly initialized."""
        return cls(**config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        num_classes: int | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a network from a folder or from the Hugging Face Hub, in eval mode.

        All files are of one commit and their checksums are compared with the Hub's. Every tensor must be there. Only
        safetensors and JSON are read.

        Args:
            pretrained_model_name_or_path: A folder with `model.safetensors` and `config.json`, or `owner/name`.
            num_classes: Another number of classes than the model's gives it a new, random last layer.
            **options: See `LoadOptions`.

        Raises:
            ValueError: If there is no such model, or it cannot be read or loaded; the message says what to do.
        """
        return cls.from_stored(read_pretrained(pretrained_model_name_or_path, **options), num_classes)

    @classmethod
    def from_stored(cls, stored: "StoredModel", num_classes: int | None = None) -> Self:
        """Build the network of stored weights around them, in eval mode; arguments as for `from_pretrained`.

        Raises:
            ValueError: If the description is of another task or describes no network, or the weights do not fit it.
        """
        description, source = stored.description, stored.source
        if description.task != cls.task:
            raise ValueError(f"{source!r} holds a network for {description.task}, and {cls.__name__} is for {cls.task}")
        same = num_classes is None or num_classes == description.config.get("num_classes")
        network = build_module(lambda: cls.from_config(description.config), stored)
        new = () if same else network.last_layers
        unsaved = dict(network.named_buffers()).keys() - network.state_dict().keys()
        if new or unsaved:  # which no file holds
            matching_tensors(network, stored.tensors, source, except_for=new)  # before it takes memory
            config = description.config if same else {**description.config, "num_classes": num_classes}
            nearest = next(iter(stored.tensors.values()))
            network = build_module(lambda: cls.from_config(config), stored, "cpu").to(nearest.device, nearest.dtype)
        load_tensors(network, stored.tensors, source, except_for=new, assign=True)
        network.annotate(description, labels=same)
        if not same and num_classes:
            before = description.config.get("num_classes")
            logger.warning("the last layer is new and random: %d outputs instead of %s", num_classes, before)
        return network.eval()

    def annotate(self, description: "Description", labels: bool = True) -> None:
        """Set preprocessing and, with `labels`, class names to those of a description."""
        self.preprocessing, self.multi_label = description.preprocessing, labels and description.multi_label
        self.class_names = description.class_names if labels else None

    def describe(self) -> "Description":
        """Return everything about the network except its weights.

        Raises:
            ValueError: If the network was pruned, so that nothing describes it.
        """
        from scalablevit_pl.weights.stored import Description

        if not self.config:
            raise ValueError("a pruned network has no description from which it could be rebuilt: save the whole one")
        values: Any = {"network_class": network_class(self), "multi_label": self.multi_label}
        return Description(self.task, self.config, self.class_names, self.preprocessing, **values)

    def save_pretrained(self, save_directory: str | Path, *, license: str | None = None) -> None:  # noqa: A002
        """Write `model.safetensors`, `config.json` and the card `README.md` into a folder.

        A card without weights is left alone; the card of an existing model is backed up to `README.md.old`.

        Args:
            save_directory: The folder, created if needed. Existing files are replaced once all are written.
            license: Identifier of the licence for a new card, such as `apache-2.0`.

        Raises:
            ValueError: If a weight is not finite, or the network was pruned.
            OSError: If the folder cannot be written; existing files stay.
        """
        from scalablevit_pl.weights.card import Provenance, write_card
        from scalablevit_pl.weights.folder import CARD, WEIGHTS

        folder = Path(save_directory)
        waiting = (folder / CARD).is_file() and not (folder / WEIGHTS).is_file()
        card = None if waiting else write_card(card_subject(self), folder.resolve().name, Provenance(license=license))
        save_network(self, folder, card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model with scalablevit_pl",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        license: str | None = None,  # noqa: A002
    ) -> str:
        """Save the network into a temporary folder and push that to the Hub as one commit.

        To keep a card of your own, save or export into a folder and push that with `scalablevit push`.

        Args:
            repo_id: `owner/name`, or a name below the owner of the token; created if needed.
            commit_message: Title of the commit.
            private: Whether a new repository is private; by default as the owner's settings say.
            token: Access token; by default the one that `hf auth login` has stored.
            branch: Branch to push to, created if needed; by default the main one.
            license: Licence under which the model is shared, such as `apache-2.0`; the card must state one.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If something is missing or not allowed, or the Hub rejects the files.
        """
        import tempfile

        from scalablevit_pl.weights.hub.client import repository_url
        from scalablevit_pl.weights.hub.upload import plan_push, push

        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / (repo_id.rpartition("/")[2].strip(".") or "model")
            self.save_pretrained(folder, license=license)
            check = type(self).from_pretrained
            plan = plan_push(folder, repo_id, check=check, private=private, branch=branch, token=token)
            pushed = push(plan, commit_message)
        return f"{repository_url(pushed.repository)}/commit/{pushed.commit}"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, which saves memory and costs time."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides biases and norms, that take no weight decay: those of the backbone."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort the parameters by depth, for learning rates that fall from layer to layer.

        Args:
            coarse: Sort by stages, not blocks.
        """
        return prefix_patterns(self.backbone.group_matcher(coarse), r"backbone\.") | {"head": r"^head"}

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the last layer, or all if there are several."""
        layers = tuple(map(self.get_submodule, self.last_layers))
        return layers if len(layers) > 1 else layers[0]

    def preprocess(self, image: "ImageLike") -> Tensor:
        """Transform an image as in training: `(C, H, W)`, float32, on the CPU.

        Args:
            image: Path of a file, a PIL image, or an array or tensor of bytes `(H, W)`, `(H, W, C)` or `(C, H, W)`.

        Raises:
            ValueError: If it is not an image or cannot be read, or the network takes other channels than its
                preprocessing returns.
        """
        return self._open(image)[0]

    def _open(self, image: "ImageLike") -> tuple[Tensor, tuple[int, int]]:
        """Return a transformed image, and the height and width that it had before."""
        from scalablevit_pl.preprocessing.decoding import open_image

        preprocessing = self.preprocessing
        channels = getattr(preprocessing, "channels", 3)  # a user's own transform takes RGB images
        if channels != self.in_chans:
            raise ValueError(
                f"images have {channels} channels and this network takes {self.in_chans}: preprocess them yourself"
            )
        opened = open_image(image, channels)
        return preprocessing(opened), (opened.height, opened.width)

    def predict(self, images: "ImageLike | Sequence[ImageLike]", batch_size: int = 32) -> list[Any]:
        """Run the network on images and return the output for each.

        Args:
            images: An image or several, each as `preprocess` takes it; or a folder or a pattern such as `photos/*.jpg`
                for its image files, sorted by name.
            batch_size: Images that go through the network at a time.

        Raises:
            ValueError: If an image cannot be read, or a number is below 1.
        """
        return [output for outputs, _ in self._outputs(images, batch_size) for output in outputs]

    def _outputs(self, images: Any, batch_size: int) -> Iterator[tuple[Any, list[tuple[int, int]]]]:
        """Yield outputs for batches of transformed images of equal size, in eval mode and without gradients.

        With each batch come the height and width of its images before the transform.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        several: Any = images if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
        weight, modes = next(self.parameters()), {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.inference_mode():
                for batch, sizes in _batches(map(self._open, chain.from_iterable(map(_files, several))), batch_size):
                    yield self(batch.to(weight.device, weight.dtype)), sizes
        finally:
            for module, training in modes.items():  # a part of it may be frozen in eval mode
                module.training = training


def _files(image: Any) -> Sequence[Any]:
    """Return the image files of a folder or pattern, or the image itself."""
    if not isinstance(image, str | Path) or Path(image).is_file():
        return [image]
    from scalablevit_pl.data.folders import find_images

    return find_images([image])


def _batches(
    images: Iterator[tuple[Tensor, tuple[int, int]]], batch_size: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Stack consecutive images of equal size, `(C, H, W)` each, into batches, each with its images' original sizes."""
    waiting: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for image, size in images:
        if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
            yield torch.stack(waiting), sizes
            waiting, sizes = [], []
        waiting.append(image)
        sizes.append(size)
    if waiting:
        yield torch.stack(waiting), sizes


def save_network(
    network: PretrainedNetwork, folder: str | Path, card: str | None, pictures: Sequence[Path] = ()
) -> None:
    """Write a network's folder; arguments and errors are those of `weights.folder.write_folder`."""
    from scalablevit_pl.weights.folder import write_folder

    # Parts that `torch.compile` has wrapped are saved under their plain names.
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}
    write_folder(folder, network.describe(), tensors, card, pictures)


def network_class(network: nn.Module) -> str | None:
    """Return the import path of a network's class, or None if it is one of this package."""
    kind = type(network)
    return None if kind.__module__.startswith(f"{__package__}.") else f"{kind.__module__}.{kind.__qualname__}"


def card_subject(network: PretrainedNetwork) -> "CardSubject":
    """Describe a network for its card."""
    from scalablevit_pl.models.cost import count_multiply_adds
    from scalablevit_pl.weights.card import CardSubject

    parameters = sum(parameter.numel() for parameter in network.parameters())
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    subject = CardSubject(network.describe(), parameters, dtype, network.usage)
    size = getattr(network.preprocessing, "input_size", COST_SIZE)
    try:
        with torch.device("meta"):  # a network in float32 that is not compiled
            twin = type(network).from_config(network.config).eval()
            layers, products = count_multiply_adds(twin, (network.in_chans, size, size))
    except (NotImplementedError, RuntimeError):  # a user's network that cannot run on the meta device
        return subject
    text = f"{layers / 1e9:.3f} G in convolutions and linear layers, and {products / 1e9:.3f} G in attention products"
    return replace(subject, multiply_adds=text, input_size=size)
