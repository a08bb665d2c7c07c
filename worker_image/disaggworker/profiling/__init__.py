"""`disaggworker profile`: measured steps of an engine, as `disaggserve fit` takes them.

`grid` says what is measured and writes it, `inside` measures our engine in this process, `over_http` any server that
speaks OpenAI's API, `main` reads the flags.
"""
