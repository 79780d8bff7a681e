"""One archive: a directory of images and their manifests, with a catalogue.  See FORMAT.md."""
