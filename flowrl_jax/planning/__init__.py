"""What a run needs, before there are chips to run it on."""
