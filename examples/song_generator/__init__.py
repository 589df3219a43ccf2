"""Makes songs whose words are known: rhymeless lyrics, synthetic voices that sing, an accompaniment.

    python -m examples.song_generator training-songs --out FOLDER

See docs/songs.md. Words flow into `lyrics`, those into a `plan`; `voices` speak a line, `singing` gives it a
melody, `accompaniment` plays along, `rendering` puts a song together and `making` makes them all.
"""
