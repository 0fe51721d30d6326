"""Linear probing: a head trained to convergence on the features of a frozen model, which are computed once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.finetune.data import Pictures, open_data
from efft_kernels.finetune.models import make_model, normalisation

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of predicted classes, to the base 36
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the "auto" of settings


def measure(data: str, settings: dict, seed: int, device: str, epochs: int, lr: float, batch_size: int = 64) -> dict:
    """Train and measure a linear head on the frozen features of a model.

    The head starts at zero and is trained by AdamW with a cosine schedule.

    Args:
        data: the name of a registered source.
        settings: of efft_kernels.finetune: model, checkpoint, image_size, weight_decay.
        epochs, lr, batch_size: of the head's training.

    Returns:
        Accuracies in %, loss, and numbers of parameters.
    """
    device = DEVICE if device == "auto" else device
    size = settings.get("image_size", 224)
    opened = open_data(data, size)
    torch.manual_seed(seed)
    model = make_model(settings["model"], len(opened.classes), size, settings["checkpoint"]).to(device).eval()
    x, y = _features(model, opened.train, settings, device)
    test_x, test_y = _features(model, opened.test, settings, device)
    # scale the features, so that one grid of learning rates fits all models
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    head = nn.Linear(x.shape[1], len(opened.classes), device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=settings.get("weight_decay", 1e-4))
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=device).split(batch_size)[: len(x) // batch_size]:
            loss = F.cross_entropy(head(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        counts = {"parameters": 0, "head_parameters": sum(p.numel() for p in head.parameters())}
        return answers(head(test_x), test_y) | counts


def answers(logits: Tensor, labels: Tensor) -> dict:
    """Accuracies in %, the loss, and the predicted class of every image as a digit to the base 36."""
    said = logits.argmax(1)
    each = [(said == labels)[labels == c].double().mean().item() for c in labels.unique()]
    return {
        "top1": 100 * (said == labels).double().mean().item(),
        "mean_class": 100 * sum(each) / len(each),
        "loss": F.cross_entropy(logits, labels).item(),
        "predictions": "".join(DIGITS[c] for c in said.tolist()) if logits.shape[1] <= len(DIGITS) else None,
    }


@torch.inference_mode()
def _features(model: nn.Module, images: Pictures, settings: dict, device: str) -> tuple[Tensor, Tensor]:
    """The inputs of the model's head [n, d], and the labels [n]."""
    how = settings.get("normalize", "imagenet")
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in normalisation(model, how))
    loader = torch.utils.data.DataLoader(images, batch_size=settings.get("batch_size", 64))
    found = []
    for batch, _ in loader:
        x = (batch.to(device).float() - mean) / std
        found.append(model.forward_head(model.forward_features(x), pre_logits=True))
    return torch.cat(found).clone(), torch.tensor(images.labels, device=device)
