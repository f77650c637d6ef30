"""Runs one untrusted Python program, so that the host it runs on need not trust it.

Five parts, each of which trusts only what stands above it:

    runner     the trainer's side: starts a launcher, hands it a job, reads a verdict
    launcher   a small process of its own: makes the namespaces, compares what programs print
    executor   the first process inside: starts programs, bounds them, ends them
    judge      inside: runs calls and assertions against the program, and knows what is expected
    worker     inside: the program itself

The program never shares memory, a descriptor or a stack with what knows the expected results, so
that nothing it prints, returns, patches or exits with makes a wrong program right.
`docs/rewards.md` says what is and what is not kept out.
"""
