"""Where in a text does z matter? rec by position, with a text's own z and with another text's.

    python -m study.positions RUN

The difference is the swap cost of the tokens there. One z is the only thing that the decoder reads
of a text; the words it has already written are the rest of what it knows. So z may matter at the
beginning alone, or to the end. Late positions are those of long texts only.
"""

import argparse
import itertools

import torch

import data
import metrics

EDGES = (0, 5, 10, 20, 40, 80, 160, 320, 640, 10**9)  # of the rows, in tokens


@torch.no_grad()
def by_position(model, corpus):
    """Rows of {"start", "stop": positions [start, stop); "tokens": their number; "rec",
    "rec_other": nats per token, with a sample of the text's own posterior and of another's}.
    """
    model.eval()
    z = metrics.measure(model, corpus)["z"].float()
    other = metrics.other_texts(len(corpus))
    longest = int(corpus.lengths.max())
    nats, counts = torch.zeros(2, longest, dtype=torch.float64), torch.zeros(longest)
    for index in data.evaluation_order(corpus.lengths, metrics.MOST):
        batch = data.make_batch(corpus, index).to(model.device)
        length = batch.labels.shape[1]
        counts[:length] += batch.mask.sum(0).cpu()
        for i, rows in enumerate((index, other[index])):
            of_tokens = model.rec_of_tokens(z[rows].to(model.device), batch.labels)  # (B, T)
            nats[i, :length] += of_tokens.double().sum(0).cpu()
    found = []
    for start, stop in itertools.pairwise(EDGES):
        tokens = int(counts[start:stop].sum())
        if tokens:
            own, others = (nats[:, start:stop].sum(1) / tokens).tolist()
            rows = {"start": start, "stop": min(stop, longest), "tokens": tokens}
            found.append(rows | {"rec": own, "rec_other": others})
    return found


def of_run(run, dataset=None):
    """`by_position` of a run's test split. dataset: where its texts are, if they have moved."""
    _, model, read = metrics.load_run(run, dataset=dataset)
    if model.latent_dim == 0:
        raise data.InputError(f"{run} is a language model: it has no z")
    corpus = read("test")
    if len(corpus) < 2:
        raise data.InputError(f"{run} has one test text; there must be another, whose z to take")
    return by_position(model, corpus)


def main(argv=None):
    parser = argparse.ArgumentParser("positions.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="finished run folder of train.py")
    parser.add_argument("--dataset", help="where the texts are, if they have moved")
    args = parser.parse_args(argv)
    with data.command("positions.py"):
        found = of_run(args.run, args.dataset)
        print("tokens of a text    number     rec  rec_other  swap cost")
        for row in found:
            place = f"{row['start'] + 1} to {row['stop']}"
            rec, other = row["rec"], row["rec_other"]
            print(f"{place:16}{row['tokens']:10,}{rec:8.3f}{other:11.3f}{other - rec:11.3f}")
        print("Nats per token; swap cost: rec_other - rec.")


if __name__ == "__main__":
    main()
