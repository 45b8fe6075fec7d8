"""Compares our evaluation with clip_benchmark's, on the same weights (there through open_clip) and the same folders.

    pip install -e . clip_benchmark open_clip_torch "numpy<2.4"   # in an environment of its own, for the sake of this numpy
    python tests/proofs/compare_with_clip_benchmark.py --model runs/quickstart/export \\
        --classification DATA/wds_emoji_categories --retrieval DATA/wds_emoji_retrieval

Zero-shot accuracy and recall must agree to 1e-6, the linear probe's accuracy, as a mean over ten seeds, to half a point: its
first weights and the order of its batches are random. Exits with 1 where something does not.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_maskclip import MaskCLIPModel
from hf_maskclip.conversion.open_clip import export_to_open_clip
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.runner import run_evaluations

try:
    import open_clip
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
except ImportError as error:
    sys.exit(f"{error}: see the head of this file for what to install")

SEEDS = range(10)
# Our metric: theirs.
ZERO_SHOT = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
RETRIEVAL = {f"image_to_text_recall@{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)}
RETRIEVAL |= {f"text_to_image_recall@{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a CLIP")
    parser.add_argument("--classification", required=True, help="clip-benchmark folder with a train and a test split")
    parser.add_argument("--retrieval", required=True, help="clip-benchmark folder")
    options = parser.parse_args()

    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    )
    model = MaskCLIPModel.from_pretrained(options.model, dtype=torch.float32)
    encoder = Encoder(model, processor)
    with tempfile.TemporaryDirectory() as folder:
        export_to_open_clip(model, folder, processor)
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    theirs.eval()

    def ours(data: str, task: str) -> dict:
        return next(record for _, record in run_evaluations(encoder, find_evaluations(data, Request(task))))

    def loader(data: str, task: str, split: str = "test") -> DataLoader:
        name = "wds/" + Path(data).name.removeprefix("wds_")
        dataset = build_dataset(name, root=data, transform=transform, split=split, task=task)
        found = DataLoader(dataset.batched(64), batch_size=None)
        found.dataset.classes, found.dataset.templates = dataset.classes, dataset.templates
        return found

    differences = []

    def compare(name: str, mine: float, other: float, tolerance: float) -> None:
        verdict = "equal" if abs(mine - other) <= tolerance else "DIFFERENT"
        print(f"{name:40} ours {mine:.6f}   clip_benchmark {other:.6f}   {verdict}")
        if verdict == "DIFFERENT":
            differences.append(name)

    images = loader(options.classification, "zeroshot_classification")
    classes, templates = images.dataset.classes, images.dataset.templates
    found = zeroshot_classification.evaluate(theirs, images, tokenizer, classes, templates, "cpu", amp=False)
    mine = ours(options.classification, "zero_shot_classification")
    for name, other in ZERO_SHOT.items():
        compare(f"zero-shot {name}", mine[name], found[other], 1e-6)

    images = loader(options.retrieval, "zeroshot_retrieval")
    found = zeroshot_retrieval.evaluate(theirs, images, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    mine = ours(options.retrieval, "retrieval")
    for name, other in RETRIEVAL.items():
        compare(f"retrieval {name}", mine[name], found[other], 1e-6)

    torch.nn.Module.cuda = lambda module: module  # its probe asks for a GPU by name
    torch.Tensor.cuda = lambda tensor: tensor
    train, test = (features_of(theirs, loader(options.classification, "linear_probe", split)) for split in ("train", "test"))
    theirs_by_seed, ours_by_seed = [], []
    (probe,) = find_evaluations(options.classification, Request("linear_probe"))
    for seed in SEEDS:
        batches = DataLoader(TensorDataset(*train), batch_size=512, shuffle=True)
        fitted = linear_probe.train(batches, train[0].shape[1], len(classes), 0, 0.1, 10, False, "cpu", seed)
        logits, labels = linear_probe.infer(fitted, DataLoader(TensorDataset(*test), batch_size=512), False, "cpu")
        theirs_by_seed.append((logits.argmax(dim=1) == labels).float().mean().item())
        ours_by_seed.append(probe.run(encoder, seed=seed)["top1"])
    compare(f"linear probe top1, mean of {len(SEEDS)} seeds", mean(ours_by_seed), mean(theirs_by_seed), 0.005)
    return 1 if differences else 0


def features_of(model: torch.nn.Module, images: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        batches = [(F.normalize(model.encode_image(pixels), dim=-1), labels) for pixels, labels in images]
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat([torch.as_tensor(label) for label in labels])


if __name__ == "__main__":
    sys.exit(main())
