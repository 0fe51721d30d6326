"""README, docs/ and the other pages: links, paths, imports and commands exist, and README's code runs as written."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from models import images, timm, vit
from torch import nn

import efft_kernels as ek

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# what a page may name that a checkout does not have: examples of a user's own files
PATH = re.compile(r"(?:efft_kernels|csrc|benchmarks|tests|docs|examples|\.ci)/[\w./-]*[\w/]")


def text_of(page: Path) -> str:
    """The page without generated tables, whose paths are those of their records."""
    return re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page are linked: lower case, punctuation dropped, hyphens for spaces."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pages
def test_links_exist(page):
    for target in re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", page.read_text(), flags=re.MULTILINE):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), f"{page.name} links to {target}"
        assert found.is_relative_to(ROOT), f"{page.name} links outside of the repository: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}, but has {sorted(anchors(found))}"


def test_the_link_check_sees_a_dead_link(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](nowhere.md)\n")
    with pytest.raises(AssertionError, match="nowhere.md"):
        test_links_exist(page)


@pages
def test_paths_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what has been")
    for line in text_of(page).splitlines():
        if "http" not in line and "<gpu>" not in line and "NAME" not in line:
            for path in PATH.findall(line):
                assert (ROOT / path).exists(), f"{page.name} names {path}"


@pages
def test_commands_exist(page):
    for module in re.findall(r"-m (efft_kernels[\w.]*)", text_of(page)):
        spec = importlib.util.find_spec(module)
        runs = spec and (not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"))
        assert runs, f"{page.name} runs python -m {module}"


@pages
def test_imports_of_code_exist(page):
    for code in code_of(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "efft_kernels":
                if node.module.startswith("efft_kernels.peft"):
                    timm()
                    pytest.importorskip("peft")
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


def test_readme_is_a_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_readme_and_ci_have_the_same_commands():
    commands = 'pip install -e ".[bench]" && python benchmarks/bench_forward.py', 'pip install -e ".[test]" && pytest'
    readme = (ROOT / "README.md").read_text()
    assert all(f"    {command}" in readme for command in commands)
    assert f"\n{commands[1]}\n" in (ROOT / ".ci" / "run").read_text()


def test_readme_states_the_formula():
    """The "equivalent to" block of README is what EFFTLinear computes."""
    equivalent, _ = code_of(ROOT / "README.md")
    layer = ek.EFFTLinear(12, 20, rank=3, scale=0.7).double()
    nn.init.normal_(layer.v)
    names = {"F": nn.functional, "x": torch.randn(5, 12).double(), "weight": layer.weight, "bias": layer.bias}
    names |= {"u": layer.u, "sigma": layer.sigma[0], "v": layer.v, "scale": layer.scale}
    exec(equivalent, names)
    torch.testing.assert_close(layer(names["x"]), names["y"])


def test_readme_code_runs(tmp_path, monkeypatch):
    """README's lines, unchanged, on a ViT of two blocks without pre-trained weights and with small images."""
    library = timm()
    create, randn = library.create_model, torch.randn
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32}

    def create_small(name, pretrained, **options):
        return create(name, pretrained=False, **small, **options)

    monkeypatch.setattr(library, "create_model", create_small)
    monkeypatch.setattr(torch, "randn", lambda *size: randn(*(32 if n == 224 else n for n in size)))
    monkeypatch.chdir(tmp_path)
    _, code = code_of(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    before = torch.get_rng_state()
    names = {}
    exec(code, names)
    assert names["loss"].isfinite()
    model = names["model"]
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))

    torch.set_rng_state(before)
    fresh = ek.load_adapter(create_small("vit_base_patch16_224", True, num_classes=37), tmp_path / "pets.safetensors")
    images = randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_code_of_the_fine_tuning_page_runs(tmp_path, monkeypatch):
    """The blocks on whole models, several adapters, their mean, files and one layer, one after the other."""
    monkeypatch.chdir(tmp_path)
    names = {"model": vit(depth=3), "images": images()}
    for code in code_of(ROOT / "docs" / "finetuning.md")[:5]:
        exec(code, names)
    assert type(names["block"].attn.qkv) is nn.Linear
    assert list(names["model"].efft) == ["default", "pets"]


def test_public_names_are_documented():
    assert all(inspect.getdoc(getattr(ek, name)) for name in ek.__all__)


def test_architecture_names_every_module():
    """The page that says where things are names every folder, and every file outside of finetune and serving."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "efft_kernels"
    for path in sorted(package.iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in page, f"docs/architecture.md does not name {path.name}"
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in page or f"`{path.name}`" in page, f"docs/architecture.md lacks {path.name}/"


def test_one_version():
    """Stated in the package alone; the changelog has it as a release, the citation file does not repeat it."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "efft_kernels.__version__" }' in pyproject
    assert not re.search(r'^version = "', pyproject, flags=re.MULTILINE)
    assert re.search(rf"^## {re.escape(ek.__version__)}$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)


def test_citation_file():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["preferred-citation"]["title"] in " ".join((ROOT / "README.md").read_text().split())


def test_typed_marker_is_packaged():
    assert (ROOT / "efft_kernels" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()
