"""Built-in data: sets that come inside packages or are drawn, so that nothing has to be found first."""

from .data import Arrays, Source, source
from .models import need


@source("digits")
def digits() -> Source:
    """1 797 handwritten digits of 8 x 8 pixels, part of scikit-learn (BSD): the last 360 are the test part."""
    need("sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = (found.images * 15.9).astype("uint8"), found.target.tolist()
    cut = len(images) - 360
    train = Arrays("digits", images[:cut], labels[:cut])
    test = Arrays("digits (test)", images[cut:], labels[cut:])
    return Source(train, None, test, tuple(map(str, range(10))))
