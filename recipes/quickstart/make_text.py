"""Writes the text of the quickstart: short reviews, some kind, some not, by a grammar with a fixed seed.

Run it with Python 3.6 or later: `python3 recipes/quickstart/make_text.py`. Every run writes the same bytes.

    text/sft-train.jsonl, text/sft-held-out.jsonl      {"prompt", "completion"}           what the language model learns
    text/pairs-train.jsonl, text/pairs-held-out.jsonl  {"prompt", "chosen", "rejected"}   what the reward model learns
    prompts-train.jsonl, prompts-held-out.jsonl        {"prompt"}                         what PPO starts its reviews from

A review is an opinion, a detail and often a closing sentence. Each of these has a kindness from -2 to 2, drawn mostly
on the side of the review's mood, so that reviews range from all bad through mixed to all good, half of them on either
side; the chosen review of a pair is the one with the larger sum. The prompts of the held-out files share no word with
the training ones but those in FUNCTION_WORDS. The language model alone reads reviews of both, to know the words.
"""

import json
import pathlib
import random

SEED = 7
NUM_SFT_TRAIN, NUM_SFT_HELD_OUT = 24_000, 500
NUM_PAIRS_TRAIN, NUM_PAIRS_HELD_OUT = 8_000, 500
NUM_PROMPTS_TRAIN, NUM_PROMPTS_HELD_OUT = 2_048, 256
SAME_SIDE = 0.68  # how often a part of a review is on the side of the review's mood
# Between the kindness of a pair's two reviews: enough to tell, and not so much that only good and bad are compared,
# which would leave the reward model no scale among the good.
LEAST_GAP, MOST_GAP = 2, 4

FUNCTION_WORDS = set("a about across after along around at beside by down from in last my of on our over past the through to under up was".split())

# Words of one row belong together; `|` parts alternatives. (training words, held-out words)
LEADS = (
    "The|On Monday the|Last week the|My aunt said the|To my surprise the|Our neighbour told us the|In the morning the|Last summer the",
    "The|On Sunday the|Yesterday the|My sister thought the|After lunch the",
)
ADJECTIVES = {
    -2: "awful|dreadful|horrible|terrible|a disgrace",
    -1: "dull|poor|disappointing|forgettable|rather sad",
    1: "nice|pleasant|charming|quite good|rather sweet",
    2: "wonderful|superb|perfect|magical|a delight",
}
CLOSINGS = {
    -2: "I want my money back|It ruined my whole week|I will warn everyone about it|It was the worst thing all year|I am still angry about it|Please never make me do that again",
    -1: "It was not worth the money|Once was enough for me|I had hoped for more|We were a little let down|I have known better|I would not recommend it",
    1: "It was well worth the money|We were glad we tried it|I would recommend it|It was a nice surprise|We had a good time|I would try it again",
    2: "I could not be happier|It made my whole week|I will tell everyone about it|It was the best thing all year|I am still smiling about it|Please let me do that again",
}
TURNS = "Still, |Even so, |All the same, "  # before a closing that goes against what was said

# What is told of people who serve, of people who perform, of a story's parts and of a thing's parts.
STAFF = {
    -2: "shouted at us|was rude to my mother|laughed at our questions|slammed the door on us|lied to our faces",
    -1: "kept us waiting|looked bored|forgot about us|seemed tired|got our names wrong",
    1: "was polite|greeted us warmly|answered all our questions|found us a good seat|seemed happy to help",
    2: "treated us like family|could not have been kinder|gave us a gift|made us feel at home|thought of everything",
}
PERFORMERS = {
    -2: "forgot every line|insulted the crowd|put us all to sleep|was painful to hear|walked off in a rage",
    -1: "mumbled a lot|looked half asleep|was hard to hear|seemed nervous|came on late",
    1: "was fun to watch|made us laugh|had a warm voice|tried something new|got us clapping",
    2: "moved us to tears|held us spellbound|had us all dancing|shone like a star|was a joy to hear",
}
STORY = {
    -2: "made no sense at all|was a complete mess|bored me to tears|was cruel and ugly|should be thrown away",
    -1: "dragged on|felt too long|was easy to guess|left me cold|was hard to follow",
    1: "made me smile|kept me guessing|felt true|was easy to follow|had some good jokes",
    2: "took my breath away|stayed with me for days|warmed my heart|was a work of genius|was full of wonder",
}
THING = {
    -2: "broke on the first day|fell apart in my hands|smelled of old fish|cut my finger|could not be cleaned",
    -1: "felt cheap|was the wrong colour|looked worn|made a strange noise|needed repair",
    1: "felt solid|looked smart|was just the right size|pleased my children|was easy to clean",
    2: "was beautifully made|shone in the light|will last a lifetime|felt like a treasure|looked even better at home",
}

# Per subject: (nouns, held-out nouns), (places, held-out places), what details are told of, and the words for them.
SUBJECTS = [
    (
        ("soup|bread|pie|stew|curry|salad|omelette|pasta|pudding|porridge", "coffee|cake|risotto|breakfast"),
        ("at the corner cafe|at the blue bistro|at the village bakery|by the harbour|at the night market|in the station buffet|at the old inn|at the farm kitchen",
         "at the garden restaurant|on the pier|in the school canteen|at the mountain lodge"),
        "the waiter|the cook|the owner|the young chef", STAFF,
        {-2: "inedible|rotten|disgusting", -1: "bland|lukewarm|soggy", 1: "tasty|fresh|filling", 2: "delicious|heavenly|divine"},
    ),
    (
        ("film|play|show|comedy|musical|documentary|sequel", "opera|drama|cartoon|thriller"),
        ("about the lighthouse|about the lost dog|about two brothers|at the old theatre|about the great flood|about a dancing bear|at the little cinema",
         "about the moon|about a clockmaker|about the whales|on the small stage"),
        "the hero|the villain|the leading lady|the narrator", PERFORMERS,
        {-2: "unwatchable|painful|insulting", -1: "slow|flat|confusing", 1: "funny|clever|lively", 2: "brilliant|thrilling|unforgettable"},
    ),
    (
        ("novel|poem|story|memoir|biography|essay|mystery|fable", "diary|romance|saga|travelogue"),
        ("about the sailor|by the young writer|from the library|about the haunted castle|about the long war|by my cousin|about the red fox",
         "about the orphan|by the retired judge|from our teacher|about the desert"),
        "the ending|the first chapter|the plot|the last page", STORY,
        {-2: "unreadable|hateful|nonsense", -1: "slow|flat|muddled", 1: "clever|witty|touching", 2: "brilliant|gripping|unforgettable"},
    ),
    (
        ("room|cabin|suite|cottage|bed|balcony", "attic|guesthouse|bathtub|villa"),
        ("in the seaside hotel|on the third floor|by the lake|near the airport|in the ski resort|at the end of the road|above the pub",
         "beside the cathedral|in the royal palace|at the golf club|on the houseboat"),
        "the porter|the landlady|the maid|the night clerk", STAFF,
        {-2: "filthy|freezing|full of rats", -1: "damp|noisy|cramped", 1: "clean|cosy|quiet", 2: "spotless|luxurious|fit for a queen"},
    ),
    (
        ("walk|hike|ride|tour|cruise|drive|boat trip|train journey", "ferry crossing|picnic|climb|safari"),
        ("along the river|through the forest|over the hills|to the island|across the valley|around the bay|through the old town",
         "up the volcano|past the vineyards|down the canyon|beside the canal"),
        "the guide|the driver|the captain|the woman in charge", STAFF,
        {-2: "dangerous|a nightmare|miserable", -1: "tiring|muddy|too long", 1: "relaxing|sunny|refreshing", 2: "breathtaking|glorious|unforgettable"},
    ),
    (
        ("coat|umbrella|lamp|kettle|chair|watch|radio|bicycle|blanket|clock", "camera|scarf|guitar|suitcase"),
        ("from the corner shop|from the market stall|in the winter sale|from the catalogue|from my uncle|in the big window|from the factory",
         "from the antique dealer|from the online store|in the charity raffle|from our grandfather"),
        "the box|the bottom|the front of it|every part of it", THING,
        {-2: "broken|useless|a fraud", -1: "flimsy|ugly|scratched", 1: "sturdy|handy|pretty", 2: "gorgeous|exquisite|flawless"},
    ),
    (
        ("concert|song|band|choir|orchestra|dance", "quartet|recital|festival|drummer"),
        ("in the town hall|in the park|at the wedding|at the county fair|in the chapel|at the jazz cellar",
         "at the carnival|under the bridge|in the courtyard|on the rooftop"),
        "the singer|the violinist|the man at the piano|the soloist", PERFORMERS,
        {-2: "unbearable|painful|a racket", -1: "too loud|flat|out of tune", 1: "lively|catchy|tuneful", 2: "stunning|glorious|heavenly"},
    ),
]


def main():
    rng = random.Random(SEED)
    seen = set()
    write("text/sft-train", reviews(rng, NUM_SFT_TRAIN, (0, 0, 1), seen))
    write("text/sft-held-out", reviews(rng, NUM_SFT_HELD_OUT, (0, 0, 1), seen))
    write("text/pairs-train", pairs(rng, NUM_PAIRS_TRAIN, 0))
    write("text/pairs-held-out", pairs(rng, NUM_PAIRS_HELD_OUT, 1))
    train, held_out = prompts(rng, NUM_PROMPTS_TRAIN, 0), prompts(rng, NUM_PROMPTS_HELD_OUT, 1)
    assert not (content_words(train) & content_words(held_out)), content_words(train) & content_words(held_out)
    write("prompts-train", train)
    write("prompts-held-out", held_out)


def reviews(rng, count, parts, seen):
    """`count` reviews of the training words (part 0) and held-out words (part 1), none of them in `seen`."""
    rows = []
    while len(rows) < count:
        subject, prompt = draw_prompt(rng, pick(rng, parts))
        completion, _ = draw_review(rng, subject)
        if prompt + completion not in seen:
            seen.add(prompt + completion)
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def pairs(rng, count, part):
    """`count` prompts with two reviews each, the kinder one chosen."""
    rows = []
    while len(rows) < count:
        subject, prompt = draw_prompt(rng, part)
        one, other = draw_review(rng, subject), draw_review(rng, subject)
        if LEAST_GAP <= abs(one[1] - other[1]) <= MOST_GAP:
            chosen, rejected = (one, other) if one[1] > other[1] else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]})
    return rows


def prompts(rng, count, part):
    """`count` different prompts."""
    texts = {}
    while len(texts) < count:
        texts[draw_prompt(rng, part)[1]] = None
    return [{"prompt": text} for text in texts]


def draw_prompt(rng, part):
    """A subject, and the beginning of a review of it: "On Monday the soup at the corner cafe was"."""
    subject = pick(rng, SUBJECTS)
    nouns, places = subject[0][part], subject[1][part]
    return subject, f"{choose(rng, LEADS[part])} {choose(rng, nouns)} {choose(rng, places)} was"


def draw_review(rng, subject):
    """The rest of a review, and its kindness, the sum of its parts'."""
    _, _, told_of, told, own_adjectives = subject
    mood = pick(rng, (-1, 1))
    opinion, detail = draw_kindness(rng, mood), draw_kindness(rng, mood)
    adjectives = choose(rng, own_adjectives[opinion] if rng.random() < 0.6 else ADJECTIVES[opinion])
    kindness = opinion
    second = opinion // abs(opinion) * pick(rng, (1, 2))
    other = choose(rng, ADJECTIVES[second])
    if rng.random() < 0.35 and " " not in adjectives + other and adjectives != other:
        adjectives, kindness = f"{adjectives} and {other}", kindness + second
    joint = "and" if opinion * detail > 0 else "but"
    text = f" {adjectives}, {joint} {choose(rng, told_of)} {choose(rng, told[detail])}."
    kindness += detail
    if rng.random() < 0.8:
        closing = draw_kindness(rng, mood)
        turn = choose(rng, TURNS) if closing * kindness < 0 else ""
        sentence = choose(rng, CLOSINGS[closing])
        if turn and not sentence.startswith("I "):
            sentence = sentence[0].lower() + sentence[1:]
        text += f" {turn}{sentence}."
        kindness += closing
    return text, kindness


def draw_kindness(rng, mood):
    side = mood if rng.random() < SAME_SIDE else -mood
    return side * pick(rng, (1, 2))


def choose(rng, alternatives):
    return pick(rng, alternatives.split("|"))


def pick(rng, options):
    # `random()` alone is promised to give the same numbers in every version of Python.
    return options[int(rng.random() * len(options))]


def content_words(rows):
    return {word for row in rows for word in row["prompt"].lower().split()} - FUNCTION_WORDS


def write(name, rows):
    path = pathlib.Path(__file__).parent / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
