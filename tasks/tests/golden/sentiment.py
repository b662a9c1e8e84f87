"""Writes sentiment.json: compound scores by the Python package, over this folder's own small lexicon.
Run: pip install vaderSentiment==3.3.2; python sentiment.py"""

import json
import pathlib
import random

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

HERE = pathlib.Path(__file__).parent

WRITTEN = """The film is smart, handsome, and funny.
The film is smart, handsome, and funny!
The film is very smart, handsome, and funny.
The film is VERY SMART, handsome, and FUNNY.
The film is VERY SMART, handsome, and FUNNY!!!
The film is VERY SMART, uber handsome, and TOTALLY FUNNY!!!
The film is not smart, handsome, nor funny.
The book was good.
At least it isn't a horrible book.
The book was only kind of good.
The plot was good, but the characters are dull and the dialog is not great.
Today SUX!
Today only kinda sux! But I'll get by, lol
Make sure you :) or :( today!
Not bad at all
ALL OF IT WAS GREAT
Reading has never been good.
Reading has never been this good!
Reading has never been so good, never so funny.
It was the bomb for all of us
With friends like these, a quiet walk is to die for
On the other hand, she is quite bad ass
He is such a badass!
Without a doubt, excellent idea.
Without any doubt, an excellent idea.
Without a doubt, an excellent idea.
It is one of the most compelling variations on this theme.
It is one of the least compelling variations on this theme.
It is at least compelling as a variation on the theme.
It was the very least good of all.
least good
Oh yeah right, a wonderful evening
There was no problem, no pain and no fear.
No good can come of this
no
No, no, NO!
I have no love or hope left
I have no love nor any hope left
What?? Why did they like it???
Is it good? Is it bad? Who can say? Nobody? Me?
It was sort of nice and just enough fun
Hardly anyone loved it, barely anyone hated it
I don't think that was really very good
nothing here was ever good
you can't but love it
but good
good but
good good but bad bad but good
It was good, but good, but it was not good
GOOD but BAD, good but bad
I love it, love it, but I hate, hate, hate that ending
the kiss of death for a great and beautiful thing
a beating heart full of love
the bus stop is ugly
<3 <3 <3 !!!!!!
...
:)
(good) "great" 'fine' *nice*
Ünder ÉVEN the best circumstances it FAILS, a fail
rarely seldom despite the good
kind
a kind of good and a kind bad man
so good, so very bad, so utterly, totally wrong
this is not the worst, it isn't the best either""".split("\n")


def drawn(rng, num_words):
    """Words that set off the rules, in any order, with capitals and punctuation now and then."""
    pools = [
        "good great love happy funny bad awful hate boring sad no best worst".split(),
        "very really so extremely barely slightly kinda almost most less".split(),
        "not never isn't without doubt don't nothing nor or least at this but kind of sort".split(),
        "the a film book was it they and with in of story".split(),
    ]
    words = []
    for _ in range(num_words):
        word = rng.choice(rng.choices(pools, [4, 2, 4, 3])[0])
        if rng.random() < 0.1:
            word = word.upper()
        if rng.random() < 0.1:
            word += rng.choice(["!", "?", ",", ".", "!!", "..."])
        words.append(word)
    return " ".join(words)


rng = random.Random(1)
texts = WRITTEN + ["", " "] + [drawn(rng, rng.randint(1, 24)) for _ in range(160)]
analyzer = SentimentIntensityAnalyzer(str(HERE / "sentiment_lexicon.txt"))
lines = [json.dumps({"text": text, "compound": analyzer.polarity_scores(text)["compound"]}, ensure_ascii=False) for text in texts]
(HERE / "sentiment.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
