"""Weights and images of a classifier: load it, save it, share it, and classify with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # at run time `models` needs torch alone; what loads and decodes is imported where it is used
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from scalablevit_pl.preprocessing import Preprocessing

    ImageLike = str | Path | Image.Image | NDArray[np.uint8]


class PretrainedClassifier(nn.Module):
    """What an image classifier does with files, the Hub and images; the network is the subclass's."""

    pretrained_cfg: dict[str, Any]
    num_classes: int
    in_chans: int
    config: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        num_classes: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a classifier from a folder or from the Hugging Face Hub, in eval mode.

        All files are of one commit, their checksums are compared with the Hub's, and each tensor must be there. Nothing
        but safetensors and JSON is read.

        Args:
            pretrained_model_name_or_path: A folder with `model.safetensors` and `config.json`, or `owner/name`.
            revision: Branch, tag or commit hash on the Hub.
            token: Access token, or False for none; by default the one that `hf auth login` has stored.
            cache_dir: Where downloads are kept; by default the Hub client's cache.
            local_files_only: Take what is cached and ask nobody.
            force_download: Download again what is cached.
            num_classes: Another number of classes than the model's gives it a new, random last layer.
            device: Where the weights shall be; by default the CPU.
            dtype: What they shall be converted to; by default they stay as they are stored.

        Raises:
            ValueError: If there is no such model, or it cannot be read or loaded; the message says what to do.
        """
        from scalablevit_pl.weights.folder import load_model
        from scalablevit_pl.weights.source import locate_model

        folder = locate_model(
            pretrained_model_name_or_path,
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cast("Self", load_model(folder, num_classes, device, dtype))

    def save_pretrained(self, save_directory: str | Path, *, license: str | None = None) -> None:  # noqa: A002
        """Write `model.safetensors`, `config.json` and the card `README.md` into a folder.

        A card that is there alone stays; that of another model, of which it speaks, is kept as `README.md.old`.

        Args:
            save_directory: The folder; made if need be. Files of the same names are replaced once all are written.
            license: Identifier of the licence for a new card, such as `apache-2.0`.

        Raises:
            ValueError: If a weight is not finite, or the network was pruned.
            OSError: If the folder cannot be written; what stood there stays.
        """
        from scalablevit_pl.weights.card import Provenance, write_card
        from scalablevit_pl.weights.folder import CARD, WEIGHTS, check_whole, save_model

        check_whole(cast("Any", self))
        folder = Path(save_directory)
        card: str | None = write_card(cast("Any", self), folder.resolve().name, Provenance(license=license))
        if (folder / CARD).is_file() and not (folder / WEIGHTS).is_file():
            card = None
        save_model(cast("Any", self), folder, card)

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
        """Save the classifier into a folder of its own and push that to the Hub as one commit.

        A model with a card of its own is better saved or exported into a folder, and pushed with `scalablevit push`.

        Args:
            repo_id: `owner/name`, or a name below the owner of the token; made if need be.
            commit_message: Title of the commit.
            private: Whether a repository that is made is private; by default as the owner's settings say.
            token: Access token; by default the one that `hf auth login` has stored.
            branch: Branch to push to, made if need be; by default the main one.
            license: The licence under which the model is shared, such as `apache-2.0`; the card has to state one.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If something is missing or not allowed, or the Hub does not take the files.
        """
        import tempfile

        from scalablevit_pl.weights.folder import load_model
        from scalablevit_pl.weights.hub import push, repository_url

        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / (repo_id.rpartition("/")[2].strip(".") or "model")
            self.save_pretrained(folder, license=license)
            pushed = push(
                folder,
                repo_id,
                check=load_model,
                private=private,
                revision=branch,
                token=token,
                commit_message=commit_message,
            )
        return f"{repository_url(pushed.repository)}/commit/{pushed.commit}"

    @property
    def preprocessing(self) -> "Preprocessing":
        """What images have to go through, as `pretrained_cfg` says.

        Raises:
            ValueError: If `pretrained_cfg` asks for something else than a square crop of the centre.
        """
        from scalablevit_pl.preprocessing import read_preprocessing

        return read_preprocessing(self.pretrained_cfg)

    def preprocess(self, image: "ImageLike") -> Tensor:
        """Turn an image into what the network was trained on: `(3, input_size, input_size)`, float32, on the CPU.

        Args:
            image: The path of a file, a PIL image, or an array of bytes `(H, W)` or `(H, W, 3)`.

        Raises:
            ValueError: If it is no image or cannot be read, or the network does not take RGB images.
        """
        from scalablevit_pl.preprocessing import open_image

        if self.in_chans != 3:
            raise ValueError(f"images have 3 channels and this network takes {self.in_chans}: preprocess them yourself")
        return self.preprocessing(open_image(image))

    def predict(
        self, images: "ImageLike | Sequence[ImageLike]", top_k: int = 5, batch_size: int = 32
    ) -> list[list[tuple[str, float]]]:
        """Classify images.

        Args:
            images: An image or several, each as `preprocess` takes it.
            top_k: How many labels to give, at most.
            batch_size: How many images go through the network at a time.

        Returns:
            For each image its most probable labels with their probabilities, the most probable first. Where the names
            of the classes are not known, a label is the class's index.

        Raises:
            ValueError: If an image cannot be read, or a number is below 1.
        """
        if min(top_k, batch_size) < 1:
            raise ValueError(f"top_k and batch_size must be at least 1, got {top_k} and {batch_size}")
        several: Any = images if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
        names = getattr(self, "class_names", None) or [str(index) for index in range(self.num_classes)]
        weight, modes = next(self.parameters()), {module: module.training for module in self.modules()}
        self.eval()
        predictions = []
        try:
            with torch.inference_mode():
                for start in range(0, len(several), batch_size):
                    batch = torch.stack([self.preprocess(image) for image in several[start : start + batch_size]])
                    logits: Tensor = self(batch.to(weight.device, weight.dtype))
                    top = logits.float().softmax(dim=1).topk(min(top_k, self.num_classes))
                    for probabilities, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                        predictions.append([(names[i], p) for i, p in zip(indices, probabilities, strict=True)])
        finally:
            for module, training in modes.items():  # a part of it may be frozen in eval mode
                module.training = training
        return predictions
