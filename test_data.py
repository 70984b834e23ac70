"""Tests of data.py: fetching from a server on this machine, corpora, labels, the cache, noise and batches."""

import gzip
import hashlib
import io
import re
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import data

# ---------------------------------------------------------------------------------------- fetching


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; a path in `server.cuts` is cut there, once; Range is honoured if `server.resumes`."""

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.resumes else 0
        self.server.log.append((self.path, start))
        body = self.server.files.get(self.path)
        if body is None or start >= max(1, len(body)):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : self.server.cuts.pop(self.path, len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts, server.resumes, server.log = {}, {}, True, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SIZES = {"train": 9000, "valid": 20, "test": 30}
TEXTS = {s: "".join(f"{s} text number {i}\n" for i in range(n)).encode() for s, n in SIZES.items()}
SHA = {split: "sha256:" + hashlib.sha256(text).hexdigest() for split, text in TEXTS.items()}


def source(monkeypatch, urls, checksums=SHA):
    monkeypatch.setitem(data.SOURCES, "ptb", data.Source("some terms", urls, checksums))


def serve(server, folder, texts=TEXTS):
    server.files |= {f"/{folder}/{split}.txt": text for split, text in texts.items()}
    return f"{server.url}/{folder}/{{split}}.txt"


def fetched(tmp_path):
    """The splits that are there and right; nothing else may be there but the list of checksums."""
    files = {path.name: path.read_bytes() for path in (tmp_path / "ptb").iterdir()}
    files.pop("SHA256SUMS", None)
    assert all(files[name] == TEXTS[name[:-4]] for name in files)
    return {name[:-4] for name in files}


def archive(kind, members):
    box = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(box, "w") as file:
            for name, text in members.items():
                file.writestr(name, text)
    else:
        with tarfile.open(fileobj=box, mode="w:gz") as file:
            for name, text in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                file.addfile(member, io.BytesIO(text))
    return box.getvalue()


def test_fetch_takes_good_files_and_prints_the_terms(server, monkeypatch, tmp_path, capsys):
    blob = hashlib.sha1(b"blob %d\0" % len(TEXTS["test"]) + TEXTS["test"]).hexdigest()
    md5 = hashlib.md5(TEXTS["valid"]).hexdigest()
    source(monkeypatch, (serve(server, "a"),), SHA | {"test": f"blob:{blob}", "valid": f"md5:{md5}"})
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert "some terms" in capsys.readouterr().out
    asked = len(server.log)
    data.fetch("ptb", tmp_path)
    assert len(server.log) == asked == 3  # what is there is not fetched again


@pytest.mark.parametrize("kind", ["sha256", "md5", "blob"])
def test_fetch_refuses_a_wrong_checksum_and_leaves_nothing(server, monkeypatch, tmp_path, kind):
    right = {"valid": SHA["valid"], "test": SHA["test"]}
    source(monkeypatch, (serve(server, "a"),), right | {"train": f"{kind}:0123"})
    with pytest.raises(FileNotFoundError, match="wrong checksum for train.txt"):
        data.fetch("ptb", tmp_path)
    assert not (tmp_path / "ptb").exists() or fetched(tmp_path) == set()


def test_fetch_tries_the_next_mirror(server, monkeypatch, tmp_path, capsys):
    corrupt = serve(server, "b", TEXTS | {"valid": b"something else\n"})
    source(monkeypatch, (f"{server.url}/nowhere/{{split}}.txt", corrupt, serve(server, "a")))
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert "404" in capsys.readouterr().out
    assert ("/nowhere/train.txt", 0) in server.log
    assert ("/a/train.txt", 0) not in server.log  # the second mirror's was good


@pytest.mark.parametrize("resumes", [True, False])
def test_fetch_survives_a_cut_connection(server, monkeypatch, tmp_path, resumes):
    server.resumes, server.cuts = resumes, {"/a/train.txt": 100_000}
    source(monkeypatch, (serve(server, "a"),))
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert server.log[:2] == [("/a/train.txt", 0), ("/a/train.txt", 100_000 if resumes else 0)]


@pytest.mark.parametrize("kept", [b"train text", b"not what it begins with", TEXTS["train"], TEXTS["train"] + b"more"])
def test_fetch_goes_on_from_an_earlier_run_or_starts_cleanly(server, monkeypatch, tmp_path, kept):
    source(monkeypatch, (serve(server, "a"),))
    (tmp_path / "ptb").mkdir()
    name = hashlib.md5(f"{server.url}/a/train.txt".encode()).hexdigest()[:8]
    (tmp_path / "ptb" / f".train.{name}.part").write_bytes(kept)
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert server.log[0] == ("/a/train.txt", len(kept))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_fetch_does_not_trust_names_in_an_archive(server, monkeypatch, tmp_path, kind):
    members = {f"./x/data/ptb.{split}.txt": text for split, text in TEXTS.items()}
    evil = {"../evil.txt": b"evil", "/tmp/../evil.txt": b"evil", "x/y/z/../../../../../train.txt": b"evil"}
    server.files["/a"] = archive(kind, evil | members)
    source(monkeypatch, (f"{server.url}/a",))
    data.fetch("ptb", tmp_path / "inner" / "data")
    assert fetched(tmp_path / "inner" / "data") == set(data.SPLITS)
    assert [path.name for path in tmp_path.rglob("*.txt") if path.parent.name != "ptb"] == []


@pytest.mark.parametrize(
    "damage", [lambda box: box[: len(box) // 2], lambda box: b"<html>", lambda box: gzip.compress(b"")]
)
def test_fetch_refuses_a_damaged_archive(server, monkeypatch, tmp_path, damage):
    server.files["/a"] = damage(archive("tar", {f"{split}.txt": text for split, text in TEXTS.items()}))
    source(monkeypatch, (f"{server.url}/a",))
    with pytest.raises(FileNotFoundError, match="/a: "):
        data.fetch("ptb", tmp_path)
    assert "test" not in fetched(tmp_path)
    source(monkeypatch, (f"{server.url}/a", serve(server, "b")))
    data.fetch("ptb", tmp_path)  # a second run gets all
    assert {"train", "valid", "test"} <= {path.stem for path in (tmp_path / "ptb").glob("*.txt")}


def test_fetch_records_an_unknown_checksum_and_holds_to_it(server, monkeypatch, tmp_path, capsys):
    source(monkeypatch, (serve(server, "a"),), {})
    data.fetch("ptb", tmp_path)
    assert SHA["train"] in capsys.readouterr().out
    (tmp_path / "ptb" / "train.txt").unlink()
    server.files["/a/train.txt"] = b"changed\n"
    with pytest.raises(FileNotFoundError, match="wrong checksum"):
        data.fetch("ptb", tmp_path)


def test_no_network_is_one_line_and_does_not_hang(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TIMEOUT", 0.05)
    closed = "http://127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never answers
        silent = f"http://127.0.0.1:{mute.getsockname()[1]}"
        source(monkeypatch, (f"{closed}/{{split}}.txt", f"{silent}/archive.tgz"))
        with pytest.raises(SystemExit) as stop:
            data.main(["ptb", "--data-dir", str(tmp_path)])
    line = str(stop.value)
    assert "\n" not in line
    for part in ("train.txt", str(tmp_path / "ptb"), closed, silent, "timed out", "--data-dir", "--dataset grammar"):
        assert part in line
    assert not list(tmp_path.iterdir())


def test_sources_are_pinned():
    for name, source in data.SOURCES.items():
        assert name in data.DATASETS
        assert source.checksums == {} or set(source.checksums) == set(data.SPLITS)
        for value in source.checksums.values():
            kind, digest = value.split(":")
            assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16, "blob": 20}[kind]


# ---------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 300)


def write(folder, name="train.txt", content=b"a king paints\na queen sings\n"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)
    return str(folder)


def texts_of(corpus, tokenizer):
    rows = np.split(corpus.ids, corpus.offsets[1:-1])
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_own_directory(tokenizer, tmp_path):
    own = write(tmp_path, content="\ufeffa king\r\n\r\n  a queen \r\n\n".encode())
    write(tmp_path, "ptb.valid.txt")
    assert list(data.read_texts(own, "train")) == ["a king", "", "a queen", ""]
    corpus = data.load_corpus(own, "train", tokenizer)
    assert texts_of(corpus, tokenizer) == ["a king", "a queen"]
    assert (corpus.skipped, corpus.truncated, corpus.words.tolist(), corpus.labels) == (2, 0, [3, 3], None)
    with pytest.raises(FileNotFoundError, match=r"no valid.txt in .*" + tmp_path.name):
        data.load_corpus(own, "valid", tokenizer)
    write(tmp_path / "ptb", "ptb.valid.txt")
    assert data.split_path("ptb", "valid", tmp_path).name == "ptb.valid.txt"


@pytest.mark.parametrize("content", [b"", b"\n\r\n   \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_name(tokenizer, tmp_path, content):
    own = write(tmp_path, "test.txt", content)
    with pytest.raises(ValueError, match="test.txt: no text"):
        data.load_corpus(own, "test", tokenizer)


def test_a_directory_where_a_file_should_be(tmp_path):
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(IsADirectoryError, match="train.txt is a directory"):
        data.split_path(str(tmp_path), "train")
    (tmp_path / "ptb" / "ptb.train.txt").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"ptb.train.txt is a directory"):
        data.split_path("ptb", "train", tmp_path)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"good\n\ncaf\xe9 bad\n", r"train.txt, line 3, byte 4 \(0xe9\)"),
        ("text".encode("utf-16"), r"train.txt, line 1, byte 1 \(0xff\)"),
        ("\ufeffab".encode() + b"\xc3\n", r"train.txt, line 1, byte 6 \(0xc3\)"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path, content, place):
    with pytest.raises(ValueError, match=place):
        list(data.read_texts(write(tmp_path, content=content), "train"))
    with pytest.raises(ValueError, match="^" + re.escape(str(tmp_path)) + ".*" + place):
        data.train_tokenizer(data.read_texts(str(tmp_path), "train"), 100)


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 5"):
        data.train_tokenizer(["a king paints"], 5)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        data.train_tokenizer([], 100)


def test_overlong_lines_are_cut_and_counted(tokenizer, tmp_path):
    own = write(tmp_path, content=b"a king paints\n" + b"the old king paints a red boat " * 5000 + b"\na queen\n")
    corpus = data.load_corpus(own, "train", tokenizer, max_length=16)
    assert corpus.truncated == 1
    assert corpus.lengths.max() == corpus.lengths[1] == 16
    assert corpus.ids[corpus.offsets[2] - 1] == tokenizer.eos_token_id
    assert corpus.words[1] == len(texts_of(corpus, tokenizer)[1].split()) + 1
    whole = data.load_corpus(own, "train", tokenizer, max_length=10**6)
    assert whole.truncated == 0
    assert whole.words[1] == 7 * 5000 + 1


def test_one_file_is_split_by_its_texts(tmp_path):
    lines = [f"text {i % 3000}" for i in range(4000)]  # a quarter of them twice
    (tmp_path / "all.txt").write_text("\n".join(lines))
    one = str(tmp_path / "all.txt")
    parts = {split: list(data.read_texts(one, split)) for split in data.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(lines)
    assert [len(set(part)) / 3000 for part in parts.values()] == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    assert not set(parts["train"]) & set(parts["test"])  # the same text twice is in the same split
    (tmp_path / "all.txt").write_text("\n".join(reversed(lines)))
    assert set(data.read_texts(one, "test")) == set(parts["test"])  # whatever the order
    other = list(data.read_texts(one, "test", shares=(0.2, 0.3, 0.5)))
    assert len(other) / 4000 == pytest.approx(0.5, abs=0.05)
    (tmp_path / "all.txt").write_text("one text")
    with pytest.raises(ValueError, match="all.txt: no text for '(valid|test)'"):
        [list(data.read_texts(one, split)) for split in data.SPLITS]


def test_shares_are_checked():
    assert data.parse_shares("0.8,0.1,0.1") == (0.8, 0.1, 0.1)
    for wrong in ("0.9,0.1", "0.9,0.1,0.1", "1,0,0", "a,b,c", "1.2,-0.1,-0.1", "nan,0.5,0.5"):
        with pytest.raises(data.argparse.ArgumentTypeError, match="shares of train, valid and test"):
            data.parse_shares(wrong)


def test_labels_are_split_off_where_they_are_and_nowhere_else(tokenizer, tmp_path):
    content = b"4\ta king paints\n\n0\ta queen\tsings\n2\ta monk\n"
    write(tmp_path / "yelp", content=content)
    corpus = data.load_corpus("yelp", "train", tokenizer, tmp_path, limit=2)
    assert corpus.labels.tolist() == ["4", "0"]
    assert list(data.read_texts("yelp", "train", tmp_path)) == ["a king paints", "", "a queen\tsings", "a monk"]
    assert corpus.words.tolist() == [4, 4]  # the label is no word
    again = data.load_corpus("yelp", "train", tokenizer, tmp_path, limit=2)
    assert again.labels.tolist() == ["4", "0"]  # from the cache
    own = write(tmp_path / "own", content=content)
    assert list(data.read_texts(own, "train"))[0] == "4\ta king paints"
    assert data.load_corpus(own, "train", tokenizer).labels is None
    for first in (b"no label here", b"no\ttext\n4\ttext", b"\ta tab", b"a long \ttext"):
        write(tmp_path / "yahoo", content=b"\n" + first + b"\nbut\ttab\n")
        labels = {label for label, _ in data.read_lines("yahoo", "train", tmp_path)}
        assert labels == ({None, "no", "4", "but"} if first.startswith(b"no\t") else {None})
    write(tmp_path / "yelp", "test.txt", b"4\ta king\n3\t\n")
    assert list(data.read_lines("yelp", "test", tmp_path)) == [("4", "a king"), ("3", "")]
    write(tmp_path / "yelp", content=b"4\ta king\nno label\n")
    with pytest.raises(ValueError, match="train.txt, line 2: no label"):
        list(data.read_texts("yelp", "train", tmp_path))


# ---------------------------------------------------------------------------------------- tokens, cache


def same(a, b):
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("ids", "offsets", "words"))
    return arrays and all(getattr(a, k) == getattr(b, k) for k in ("truncated", "skipped", "pad_id", "checksum"))


def test_tokenize_reads_a_stream_and_in_pieces_as_in_one(tokenizer):
    texts = [*data.read_texts("grammar", "test"), "", "a king"] * 2
    corpus = data.tokenize(iter(texts), tokenizer, 12, limit=3500)
    kept = [text for text in texts if text][:3500]
    whole = tokenizer(kept, add_special_tokens=False)["input_ids"]
    assert corpus.ids.tolist() == [i for row in whole for i in [*row[:11], tokenizer.eos_token_id]]
    assert (len(corpus), corpus.skipped) == (3500, 2)
    assert corpus.truncated == sum(len(row) > 11 for row in whole) > 0
    assert (corpus.ids.dtype, corpus.offsets.dtype) == (np.int32, np.int64)
    assert corpus.checksum == hashlib.sha256("".join(text + "\n" for text in texts).encode()).hexdigest()
    with pytest.raises(ValueError, match="max_length is 1"):
        data.tokenize(texts, tokenizer, 1)


def test_tokenize_holds_a_thousand_texts_at_a_time(tokenizer):
    ahead = []
    wrapped = lambda texts, **k: (ahead.append(read[0]), tokenizer(texts, **k))[1]  # noqa: E731
    wrapped.eos_token_id, wrapped.pad_token_id, wrapped.unk_token_id = 1, 0, 2
    read = [0]

    def texts():
        for _ in range(3500):
            read[0] += 1
            yield "a king"

    data.tokenize(texts(), wrapped)
    assert ahead == [1000, 2000, 3000, 3500]


def test_cache_is_used_and_keyed_by_tokenizer_settings_and_content(tokenizer, tmp_path, monkeypatch):
    own = write(tmp_path)
    first = data.load_corpus(own, "train", tokenizer)
    calls, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *a: calls.append(1) or tokenize(*a))
    assert same(data.load_corpus(own, "train", tokenizer), first)
    assert not calls
    data.load_corpus(own, "train", tokenizer, max_length=3)
    data.load_corpus(own, "train", tokenizer, limit=1)
    other = data.train_tokenizer(data.read_texts("grammar", "valid"), 100)
    assert not same(data.load_corpus(own, "train", other), first)
    assert len(calls) == 3
    write(tmp_path, content=b"a king paints\na queen paints\n")
    changed = data.load_corpus(own, "train", tokenizer)
    assert len(calls) == 4
    assert not same(changed, first)
    assert same(data.load_corpus(own, "train", tokenizer), changed)
    assert len(calls) == 4
    assert len(list((tmp_path / ".cache").iterdir())) == 4  # the stale one was replaced


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_damaged_cache_is_rebuilt(tokenizer, tmp_path, monkeypatch):
    own = write(tmp_path)
    first = data.load_corpus(own, "train", tokenizer)
    (cache,) = (tmp_path / ".cache").iterdir()
    good = cache.read_bytes()
    damages = [good[:n] for n in (0, 10, 40, len(good) // 2, len(good) - 1)] + [good + b"x"]
    for place in range(0, len(good), max(1, len(good) // 60)):
        damages.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for damaged in damages:
        cache.write_bytes(damaged)
        assert same(data.load_corpus(own, "train", tokenizer), first)
        assert cache.read_bytes()[:32] == good[:32]
    evil = io.BytesIO()
    np.savez(evil, rest=np.array([Evil(tmp_path / "opened")], dtype=object))
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: hashlib.sha256())
    cache.write_bytes(hashlib.sha256().digest() + evil.getvalue())  # a pickle is not opened even if all else fits
    assert same(data.load_corpus(own, "train", tokenizer), first)
    assert not (tmp_path / "opened").exists()


def test_where_no_cache_can_be_written_there_is_none(tokenizer, tmp_path):
    own = write(tmp_path)
    (tmp_path / ".cache").write_text("a file where the folder should be")
    assert len(data.load_corpus(own, "train", tokenizer)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "train.txt"]


def test_description(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "yelp", content=b"1\ta king paints\n2\ta queen\n\n1\ta king paints\n")
    write(tmp_path / "yelp", "valid.txt", b"1\ta king paints\n")
    write(tmp_path / "yelp", "test.txt", b"1\tthe \xe2\x82\xac\n")
    data.main(["yelp", "--data-dir", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer")])
    lines = capsys.readouterr().out.splitlines()
    train, valid, test = (line.split() for line in lines[2:5])
    assert train[1:3] == ["3", "1"]
    assert train[6:9] == ["2.67", "3", "3"]  # words: mean, median, max
    assert train[11:] == ["1", "1", "in", "valid,", "0", "in", "test", "1:", "2,", "2:", "1"]
    assert valid[11:] == ["0", "1", "in", "train,", "0", "in", "test", "1:", "1"]
    assert float(test[10][:-1]) > 0 == float(train[10][:-1])  # unknown ids
    assert sum(line.startswith("40% deleted") for line in lines) == 3
    assert sum("is not the published file" in line for line in lines) == 3
    with pytest.raises(SystemExit, match="data.py: "):
        data.main([str(tmp_path / "nothing"), "--tokenizer", str(tmp_path / "tokenizer")])


# ---------------------------------------------------------------------------------------- noise, batches


@pytest.mark.parametrize("prob", [0.15, 0.40])
def test_deletion_rate_and_what_survives(prob):
    lengths = np.arange(1, 41).repeat(50)
    rng = np.random.default_rng(0)
    ids, mask = data.pad([np.append(rng.integers(3, 1000, n - 1), 1) for n in lengths], 0)
    index = torch.arange(len(ids))
    short, short_mask = data.delete_tokens(ids, mask, prob, 0, 0, index)
    left = short_mask.sum(1).numpy()
    may_go, gone = (lengths - 1)[lengths > 10].sum(), (lengths - left)[lengths > 10].sum()
    assert abs(gone / may_go - prob) < 4 * np.sqrt(prob * (1 - prob) / may_go)
    two = left[lengths == 3]  # of two tokens both may go, but then one is taken back
    assert abs((two == 3).mean() - (1 - prob) ** 2) < 0.3
    assert (left >= np.minimum(lengths, 2)).all()
    assert (short.gather(1, short_mask.sum(1, keepdim=True) - 1) == 1).all()  # </s>
    for row, kept, m in zip(ids.tolist(), short.tolist(), short_mask.tolist(), strict=True):
        rest = iter(row)
        assert all(token in rest for token in kept[: sum(m)])  # in order
        assert not any(kept[sum(m) :])
    always, _ = data.delete_tokens(ids, mask, 0.0, 0, 0, index)
    assert torch.equal(always, ids)


def test_noise_depends_on_seed_epoch_and_text_alone():
    lengths = np.random.default_rng(0).integers(2, 30, 40)
    rows = [np.append(np.random.default_rng(i).integers(3, 1000, n - 1), 1) for i, n in enumerate(lengths)]

    def noisy(index, seed=0, epoch=0, extra=0):
        ids, mask = data.pad([rows[i] for i in index], 0)
        ids, mask = (torch.nn.functional.pad(t, (0, extra)) for t in (ids, mask))
        ids, mask = data.delete_tokens(ids, mask, 0.4, seed, epoch, torch.tensor(index))
        return {i: row[m.bool()].tolist() for i, row, m in zip(index, ids, mask, strict=True)}

    together = noisy(list(range(40)))
    alone = {}
    for rank in range(4):  # four processes, other order, other batches, more padding
        share = list(range(40))[::-1][rank::4]
        alone |= noisy(share[:3], extra=7) | noisy(share[3:])
    assert alone == together
    assert noisy(list(range(40)), epoch=1) != together != noisy(list(range(40)), seed=1)


LENGTHS = {
    "ptb": np.random.default_rng(0)
    .gamma(5.5, 5.1, 42_068)
    .astype(int)
    .clip(2, 133),  # mean 28, as PTB's training texts
    "yahoo": (20 + np.random.default_rng(0).lognormal(4.3, 0.6, 100_000)).astype(int).clip(28, 256),  # mean 110
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("world", [1, 4])
def test_epochs_are_whole_random_and_waste_little(name, world):
    lengths = LENGTHS[name]
    first = data.epoch_order(lengths, 32, seed=0, epoch=0)
    shares = [index[rank::world] for index in first for rank in range(world) if len(index) > rank]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(lengths)))
    waste = 1 - lengths.sum() / sum(len(share) * lengths[share].max() for share in shares)
    assert waste <= 0.05, f"{waste:.2%} of positions are padding"
    order = np.random.default_rng(0).permutation(len(lengths))
    unsorted = 1 - lengths.sum() / sum(32 * lengths[i].max() for i in np.array_split(order, len(lengths) // 32))
    assert unsorted > 0.2  # what the buckets spare
    again = data.epoch_order(lengths, 32, seed=0, epoch=1)
    together = {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in again}
    assert len(together) < 0.01 * len(first)  # other company in the next epoch
    means = np.array([lengths[batch].mean() for batch in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # short and long batches come mixed
    repeat = data.epoch_order(lengths, 32, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, repeat, strict=True))


def test_evaluation_has_every_text_once(tokenizer):
    corpus = data.tokenize(list(data.read_texts("grammar", "test"))[:5], tokenizer)
    seen = [i for batch in data.evaluation_batches(corpus, 2) for i in batch.index.tolist()]
    assert sorted(seen) == list(range(5))
