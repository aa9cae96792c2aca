"""Update submission: header checks, upload, acceptance."""
