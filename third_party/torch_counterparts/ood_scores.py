"""Post-hoc out-of-distribution scores in plain PyTorch, as their authors and OpenOOD write them.

The counterparts of the functions in `jaxlab.methods.ood_detection` that move no input: a score is a pair
`(fit, score)`, `fit(features, logits, labels, (kernel, bias)) -> state` or None, and
`score(state, features, logits) -> [B]`, larger for out-of-distribution examples.

As a program it times them: it reads {"path", "device"}, the path of an .npz file of outputs, then {"score"} a
line, and answers {"fit_seconds", "score_seconds"}.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Head = tuple[Tensor, Tensor]  # kernel [D, C], bias [C]


def energy(logits: Tensor) -> Tensor:
    return -torch.logsumexp(logits, dim=1)


def gen(state: None, features: Tensor, logits: Tensor, gamma: float = 0.1, top_m: int = 100) -> Tensor:
    p = torch.softmax(logits, dim=1).sort(dim=1, descending=True).values[:, :top_m]
    return (p**gamma * (1 - p) ** gamma).sum(dim=1)


def fit_temperature(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    temperature = torch.ones(1, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return temperature.detach()


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.stack([features[labels == c].mean(dim=0) for c in range(num_classes)])


def fit_mahalanobis(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> dict[str, Tensor]:
    means = class_means(features, labels, logits.shape[1])
    centred = features - means[labels]
    return {"means": means, "precision": torch.linalg.pinv(centred.T @ centred / len(features))}


def squared_distances(means: Tensor, precision: Tensor, features: Tensor) -> Tensor:
    distances = []
    for mean in means:
        centred = features - mean
        distances.append(((centred @ precision) * centred).sum(dim=1))
    return torch.stack(distances, dim=1)


def mahalanobis(state: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    return squared_distances(state["means"], state["precision"], features).min(dim=1).values / 2


def fit_relative_mahalanobis(
    features: Tensor, logits: Tensor, labels: Tensor, head: Head
) -> dict[str, Tensor]:
    mean = features.mean(dim=0)
    centred = features - mean
    precision = torch.linalg.pinv(centred.T @ centred / len(features))
    classes = fit_mahalanobis(features, logits, labels, head)
    return {**classes, "mean": mean, "background": precision}


def relative_mahalanobis(state: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    nearest = squared_distances(state["means"], state["precision"], features).min(dim=1).values
    return nearest - squared_distances(state["mean"][None], state["background"], features)[:, 0]


def fit_knn(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    return F.normalize(features, dim=1)


def knn(bank: Tensor, features: Tensor, logits: Tensor, k: int = 50, rows: int = 1024) -> Tensor:
    queries = F.normalize(features, dim=1).split(rows)
    return torch.cat([(2 - 2 * (q @ bank.T)).topk(k, largest=False).values[:, -1] for q in queries])


def fit_nnguide(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    return F.normalize(features, dim=1) * torch.logsumexp(logits, dim=1, keepdim=True)


def nnguide(bank: Tensor, features: Tensor, logits: Tensor, k: int = 100, rows: int = 1024) -> Tensor:
    queries = F.normalize(features, dim=1).split(rows)
    guidance = torch.cat([(q @ bank.T).topk(k).values.mean(dim=1) for q in queries])
    return energy(logits) * guidance


def fit_residual(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> dict[str, Tensor]:
    kernel, bias = head
    origin = -torch.linalg.pinv(kernel.T) @ bias
    centred = features - origin
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    size = features.shape[1]
    dim = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    return {"origin": origin, "null_space": vectors[:, : size - dim].contiguous()}


def residual(state: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    return torch.linalg.norm((features - state["origin"]) @ state["null_space"], dim=1)


def fit_vim(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> dict[str, Tensor]:
    state = fit_residual(features, logits, labels, head)
    alpha = logits.max(dim=1).values.mean() / residual(state, features, logits).mean()
    return {**state, "alpha": alpha}


def vim(state: dict[str, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    return state["alpha"] * residual(state, features, logits) + energy(logits)


def percentile(values: Tensor, percent: float) -> Tensor:
    values = values.flatten().sort().values  # torch.quantile takes at most 2^24 entries
    rank = percent / 100 * (len(values) - 1)
    low, high = values[math.floor(rank)], values[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


def fit_react(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Head]:
    return percentile(features, 90), head


def react(state: tuple[Tensor, Head], features: Tensor, logits: Tensor) -> Tensor:
    threshold, (kernel, bias) = state
    return energy(features.clip(max=threshold) @ kernel + bias)


def keep_head(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Head:
    return head


def ash_s(head: Head, features: Tensor, logits: Tensor, percent: float = 90) -> Tensor:
    size = features.shape[1]
    total = features.sum(dim=1, keepdim=True)
    values, places = features.topk(size - round(size * percent / 100), dim=1)
    kept = torch.zeros_like(features).scatter_(1, places, values)
    kept = kept * torch.exp(total / kept.sum(dim=1, keepdim=True))
    return energy(kept @ head[0] + head[1])


def scale(head: Head, features: Tensor, logits: Tensor, percent: float = 85) -> Tensor:
    size = features.shape[1]
    kept = features.topk(size - round(size * percent / 100), dim=1).values.sum(dim=1, keepdim=True)
    scaled = features * torch.exp(features.sum(dim=1, keepdim=True) / kept)
    return energy(scaled @ head[0] + head[1])


def fit_dice(
    features: Tensor, logits: Tensor, labels: Tensor, head: Head, percent: float = 90
) -> tuple[Tensor, Tensor]:
    kernel, bias = head
    contributions = features.mean(dim=0)[:, None] * kernel
    return kernel * (contributions > percentile(contributions, percent)), bias


def dice(state: tuple[Tensor, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    kernel, bias = state
    return energy(features @ kernel + bias)


def grad_norm(state: None, features: Tensor, logits: Tensor) -> Tensor:
    gradient = logits.shape[1] * torch.softmax(logits, dim=1) - 1
    return -features.abs().sum(dim=1) * gradient.abs().sum(dim=1)


def fit_kl_matching(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    p, predicted = torch.softmax(logits, dim=1), logits.argmax(dim=1)
    templates = torch.eye(logits.shape[1], device=logits.device)
    for c in predicted.unique():
        templates[c] = p[predicted == c].mean(dim=0)
    return templates


def kl_matching(templates: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(dim=1, keepdim=True)
    return (negative_entropy - p @ templates.log().T).min(dim=1).values


def fit_she(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    predicted = logits.argmax(dim=1)
    right = predicted == labels
    return class_means(features[right], labels[right], logits.shape[1])


def she(patterns: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    return -(features * patterns[logits.argmax(dim=1)]).sum(dim=1)


def fit_fdbd(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    weights = head[0].T
    return features.mean(dim=0), torch.linalg.norm(weights[:, None] - weights[None], dim=-1)


def fdbd(state: tuple[Tensor, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    mean, between = state
    largest, predicted = logits.max(dim=1)
    distances = ((logits - largest[:, None]).abs() / between[predicted]).nan_to_num(nan=0.0)
    return -distances.sum(dim=1) / torch.linalg.norm(features - mean, dim=1)


def fit_nci(features: Tensor, logits: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    return features.mean(dim=0), head[0].T.contiguous()


def nci(state: tuple[Tensor, Tensor], features: Tensor, logits: Tensor, alpha: float = 1e-4) -> Tensor:
    mean, weights = state
    centred = features - mean
    along = (weights[logits.argmax(dim=1)] * centred).sum(dim=1)
    return -along / torch.linalg.norm(centred, dim=1) - alpha * features.abs().sum(dim=1)


def fit_vra(
    features: Tensor, logits: Tensor, labels: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return percentile(features, 10), percentile(features, 90), *head


def vra(state: tuple[Tensor, Tensor, Tensor, Tensor], features: Tensor, logits: Tensor) -> Tensor:
    low, high, kernel, bias = state
    return energy(features.clip(low, high) @ kernel + bias)


Score = tuple[Callable | None, Callable]

# By the names and with the default hyper-parameters of `jaxlab.methods.ood_detection.scores`.
SCORES: dict[str, Score] = {
    "maximum_softmax_probability": (None, lambda state, h, f: -torch.softmax(f, dim=1).max(dim=1).values),
    "max_logit": (None, lambda state, h, f: -f.max(dim=1).values),
    "energy": (None, lambda state, h, f: energy(f)),
    "entropy": (
        None,
        lambda state, h, f: -(torch.softmax(f, dim=1) * torch.log_softmax(f, dim=1)).sum(dim=1),
    ),
    "temperature_scaled": (
        fit_temperature,
        lambda temperature, h, f: -torch.softmax(f / temperature, dim=1).max(dim=1).values,
    ),
    "uniform_cross_entropy": (None, lambda state, h, f: torch.log_softmax(f, dim=1).mean(dim=1)),
    "gen": (None, gen),
    "mahalanobis": (fit_mahalanobis, mahalanobis),
    "relative_mahalanobis": (fit_relative_mahalanobis, relative_mahalanobis),
    "knn": (fit_knn, knn),
    "vim": (fit_vim, vim),
    "residual": (fit_residual, residual),
    "react": (fit_react, react),
    "ash": (keep_head, ash_s),
    "scale": (keep_head, scale),
    "dice": (fit_dice, dice),
    "grad_norm": (None, grad_norm),
    "kl_matching": (fit_kl_matching, kl_matching),
    "she": (fit_she, she),
    "fdbd": (fit_fdbd, fdbd),
    "nnguide": (fit_nnguide, nnguide),
    "nci": (fit_nci, nci),
    "vra": (fit_vra, vra),
}


def main() -> None:
    task = json.loads(sys.stdin.readline())
    with np.load(task["path"]) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).to(task["device"]) for name in arrays}
    train = tensors["train_features"], tensors["train_logits"], tensors["train_label"].long()
    head = tensors["kernel"], tensors["bias"]
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": task["device"]}
    print(json.dumps({"environment": about}), flush=True)
    for line in sys.stdin:
        fit, score = SCORES[json.loads(line)["score"]]
        state, fit_seconds = fastest(fit, *train, head) if fit else (None, 0.0)
        with torch.no_grad():
            _, score_seconds = fastest(score, state, tensors["features"], tensors["logits"])
        print(json.dumps({"fit_seconds": fit_seconds, "score_seconds": score_seconds}), flush=True)


def fastest(function: Callable[..., Any], *arguments: Any, repeats: int = 3) -> tuple[Any, float]:
    """What the function returns, and its least time, with one thread or PyTorch's default number."""
    default, times = torch.get_num_threads(), []
    for threads in (1, default):
        torch.set_num_threads(threads)
        result = function(*arguments)
        for _ in range(repeats):
            start = time.perf_counter()
            function(*arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return result, min(times)


if __name__ == "__main__":
    main()
