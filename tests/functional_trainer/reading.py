"""Read and tokenize paths as a recipe does."""

from functional_trainer.data import Documents, Rows, Tokenizer, tokenized
from functional_trainer.options import Source


def read(paths, tokenizer: Tokenizer, vocab: int | None = None, found: list | None = None) -> Documents:
    """Return the documents of a path or of several; `found` gets a count of rows by shape for each."""
    of = [Source(str(path)) for path in (paths if isinstance(paths, list) else [paths])]
    documents, counts = tokenized(Rows(of, tokenizer, vocab))
    if found is not None:
        found += counts
    return documents
