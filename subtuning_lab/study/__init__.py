"""What scores subsets on folds and remembers every score."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "study": ["Study"],
        "records": ["Records", "RecordsError"],
        "results": ["TestResult"],
    },
)
