"""`python -m nmm.plot`: curves of a run, shapes of schedules."""

from nmm.plot import main

if __name__ == "__main__":
    main()
