"""Tests of the pictures of the study: what is on their axes is what the runs measured."""

import json

import matplotlib.image
import pytest
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer

from extras import paper_tables, plots


def write(results, text, row, seed=0, **measured):
    """A run of the study with these numbers, all invented."""
    folder = results / text / row / str(seed)
    folder.mkdir(parents=True)
    measured = {"latent_dim": 0, "au": 0, "nll_se": 0.3, "rec_se": 0.4, "entropy": None, **measured}
    (folder / "metrics.json").write_text(json.dumps(measured))
    (folder / "config.json").write_text('{"command": ""}')


@pytest.fixture
def results(tmp_path):
    """captions: all is there; ptb: a phase 1, rows that are not drawn, an empty folder; answers: no
    language model."""
    for seed, rec in enumerate((50.0, 50.2)):
        write(tmp_path, "captions", "lm", seed, kl=0.0, rec=rec, nll=rec)
    for seed, nll in enumerate((50.3, 49.5)):
        z = {"rec_other": 62.0, "exact_match": 2.5}
        write(tmp_path, "captions", "r8", seed, kl=8.0, rec=43.0, nll=nll, **z)
    z = {"rec_other": 51.0, "exact_match": 1.5}
    write(tmp_path, "captions", "paper-deep", kl=99.0, rec=52.0, nll=90.0, **z)
    pairs = {"r8/1 - lm/0": {"nll": [-0.5, 0.01]}, "lm/0 - paper-deep/0": {"nll": [-40.0, 0.02]}}
    (tmp_path / "captions" / "paired.json").write_text(json.dumps(pairs))
    write(tmp_path, "ptb", "lm", kl=0.0, rec=110.0, nll=110.0)
    write(tmp_path, "ptb", "cyclical", kl=2.0, rec=107.0, nll=108.0)
    write(tmp_path, "ptb", "linear", kl=170.0, rec=60.0)
    write(tmp_path, "ptb", "z128", kl=8.0, rec=104.0, nll=111.0)
    (tmp_path / "ptb" / "r16" / "0").mkdir(parents=True)
    write(tmp_path, "answers", "threshold0.5", kl=15.0, rec=320.0, nll=333.0)
    return tmp_path


def draw(kind, results, *flags):
    flags = ["--results", str(results), "--out", "x.png", *flags]
    return plots.draw(plots.parse_args([kind, *flags]))


def bars(axes):
    """{row/seed: (KL, gap, standard error)} of the points of a panel that have error bars."""
    found = {}
    for bar in axes.containers:
        assert isinstance(bar, ErrorbarContainer)
        (kl,), (gap,) = bar.lines[0].get_data()
        (((_, low), (_, high)),) = bar.lines[2][0].get_segments()
        found[bar.get_label()] = kl, gap, (high - low) / 2
    return found


def drawn(axes):
    """{label: (x, y)} of the single points of a panel."""
    lines = (line for line in axes.get_lines() if len(line.get_xdata()) == 1)
    return {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in lines}


def test_the_price_is_nll_above_the_language_model(results):
    captions, ptb = draw("price", results).axes
    assert captions.get_title() == "captions: language model 50.10 nats", "the mean over seeds"
    points = bars(captions)
    assert points.pop("r8/1") == pytest.approx((8, -0.5, 0.01)), "it is paired with seed 0"
    assert points.pop("paper-deep/0") == pytest.approx((99, 40, 0.02)), "paired the other way round"
    assert points.pop("r8/0") == pytest.approx((8, 0.3, 0.5)), "not paired: sqrt(0.3^2 + 0.4^2)"
    assert not points
    assert bars(ptb) == {"cyclical/0": pytest.approx((2, -2, 0.5))}, "what has no nll is left out"
    for axes in captions, ptb:
        (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
        assert low < -2.5 < 40 < high, "below zero is seen, with its error"
        assert left < 0 < 99 < right
        assert [tick for tick in axes.get_yticks() if tick <= 0], "zero has its place on the axis"


def test_the_price_of_grammar_is_nll_above_its_entropy(tmp_path):
    write(tmp_path, "grammar", "lm", kl=0.0, rec=21.25, nll=21.25, entropy=21.0)
    write(tmp_path, "grammar", "r4", kl=4.0, rec=17.0, nll=21.5, nll_se=0.05, entropy=21.0)
    (axes,) = draw("price", tmp_path).axes
    assert axes.get_title() == "grammar: entropy 21.00 nats"
    assert bars(axes) == {"r4/0": pytest.approx((4, 0.5, 0.05))}
    (dashed,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert dashed.get_ydata() == pytest.approx([0.25, 0.25]), "the language model"


def test_a_deep_row_has_a_language_model_of_its_own_or_is_hollow(results):
    def deep(figure):
        (bar,) = [b for b in figure.axes[0].containers if b.get_label() == "paper-deep/0"]
        return same_color(bar.lines[0].get_markerfacecolor(), "white"), bars(figure.axes[0])

    assert deep(draw("price", results))[0]
    write(results, "captions", "lm-deep", kl=0.0, rec=45.0, nll=45.0)
    hollow, points = deep(draw("price", results))
    assert not hollow
    assert points["paper-deep/0"] == pytest.approx((99, 45, 0.5))


def test_what_kl_buys(results):
    exact, swap = draw("buys", results).axes
    assert drawn(exact) == {"r8/0": (8, 2.5), "r8/1": (8, 2.5), "paper-deep/0": (99, 1.5)}
    assert drawn(swap) == {"r8/0": (8, 19), "r8/1": (8, 19), "paper-deep/0": (99, -1)}
    assert swap.get_ylim()[0] < -1
    assert draw("buys", results).legends[0].get_texts()[0].get_text() == "captions"


def test_the_plane_has_both_widths_and_the_published_rows(results):
    write(results, "ptb-256", "r8", kl=8.0, rec=93.5, nll=101.0)
    write(results, "ptb-256", "lm", kl=0.0, rec=100.5, nll=100.5)
    figure = draw("plane", results)
    (axes,) = figure.axes
    points = drawn(axes)
    assert points["cyclical/0"] == (2, 107)
    assert points["r8/0"] == (8, 93.5)
    assert "linear/0" not in points, "a phase 1"
    published = {row["name"]: row for row in paper_tables.reread("ptb")}
    klt = published["Max pool + Denoise + KLT"]
    assert points["paper: KLT"] == (float(klt["kl"]), klt["rec"]), "-ELBO corrected"
    assert points["Optimus (lambda 0.5)"] == pytest.approx((15.72, 96.82 - 15.72))
    assert {"paper: KLT", "Li et al. (lambda 3)"} <= {text.get_text() for text in axes.texts}
    lines = {line.get_label(): line for line in axes.get_lines() if len(line.get_xdata()) > 1}
    assert list(lines) == [
        "our language model of PTB: 110.00",
        "our language model of PTB, width 256: 100.50",
        "the paper's T5-small without z: 104.32",
        "GPT-2, from its perplexity: 89.54",
    ]
    for label, line in lines.items():
        nats = line.get_xdata() + line.get_ydata()
        assert nats == pytest.approx(float(label.split(": ")[1]), abs=0.005)
    colors = [lines[label].get_color() for label in list(lines)[:2]]
    (wide,) = [line for line in axes.get_lines() if line.get_label() == "r8/0"]
    assert wide.get_color() == colors[1] != colors[0], "a point has the color of its language model"


def test_names_cover_nothing(results):
    for seed in range(8):
        write(results, "captions", f"r{seed}", seed, kl=8.0 + seed / 50, rec=43.0, nll=51.0)
    figure = draw("plane", results, "--text", "captions")
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 4
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[i + 1 :])
        points = axes.transData.transform(list(drawn(axes).values()))
        assert not any(box.contains(*point) for point in points)


def test_pictures_are_written_and_mistakes_are_one_line(results, tmp_path):
    for kind in "price", "buys", "plane":
        out = tmp_path / f"{kind}.png"
        plots.main([kind, "--results", str(results), "--out", str(out)])
        assert matplotlib.image.imread(out).std() > 0
    for kind, folder, flags, said in (
        ("price", "no/such", (), "there is no folder"),
        ("price", results / "ptb", (), "no text has a language model"),
        ("buys", results / "ptb", (), "no row has exact_match"),
        ("plane", results, ("--text", "snli"), "no row of snli"),
        ("plane", results, ("--out", "x.nothing"), "not supported"),
    ):
        with pytest.raises(SystemExit, match=f"^plots.py: .*{said}"):
            plots.main([kind, "--out", "x.png", "--results", str(folder), *flags])
    with pytest.raises(SystemExit):
        plots.parse_args(["curves", "--out", f"{tmp_path}/", "run"])
    for damage in '{"rec": 1', '{"latent_dim": 0, "kl": 0, "rec": "110", "au": 0}':
        (results / "ptb" / "lm" / "0" / "metrics.json").write_text(damage)
        with pytest.raises(SystemExit, match=r"metrics\.json is damaged"):
            plots.main(["price", "--out", "x.png", "--results", str(results)])
