"""The laboratory: experiments and claims as data, runs, verdicts and their page."""
