"""What a run leaves for people: curves."""

from ..extras import need


def curves(file, record: dict) -> None:
    """Loss, accuracy and learning rate by epoch, as PNG."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = record["history"]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, (key, label) in zip(
        axes, (("loss", "loss, nats"), ("top1", "top-1 accuracy, %"), (None, "learning rate"))
    ):
        for part in ("train", "val") if key else ():
            points = [(entry["epoch"], entry[part][key]) for entry in history if part in entry]
            if points:
                axis.plot(*zip(*points), label=part)
        if key is None:
            axis.plot([entry["epoch"] for entry in history], [entry["lr"] for entry in history])
        elif key == "top1" and "test" in record["result"]["metrics"]:
            final = record["result"]["metrics"]["test"]
            axis.plot(
                [record["result"]["epoch"]], [final["top1"]], "k*", label=f"test, at the end: {final['top1']:.2f}"
            )
        axis.set(xlabel="epoch", ylabel=label)
        if key:
            axis.legend()
    settings, result = record["settings"], record["result"]
    figure.suptitle(
        f"{settings['method']} on {settings['model']}, {result['parameters']:,} trained parameters and the head"
    )
    figure.savefig(file, format="png", dpi=120)
