"""Who has which copy: recovery, learners, in-sync sets, audits, administration."""
