"""Common words and captions: what an edit leaves alone unless it is asked to, and where it looks for neighbours."""

NOUNS = tuple(
    """
    airplane ant apple apron arm arrow automobile axe baby bag ball balloon banana barn basket bat bathtub beach bear
    beaver bed bee beetle bell bench berry bicycle bird blanket boat book boot bottle bowl box boy bread brick bridge
    broom brush bucket building bunny burger bus butter butterfly button cabin cactus cake camel camera candle cap car
    carpet carrot castle cat cave chair cheese cherry chick chicken child church circle city clock cloud clown coat coffee
    coin computer cookie corn couch cow crab crown cup curtain deer desk dinosaur doctor dog doll dolphin donkey door
    dragon dress drum duck eagle ear egg elephant engine eye face farm feather fence field fire fish flag flower fly foot
    forest fork fox frog fruit garden gate ghost giraffe girl glass glove goat gold goose grapes grass guitar hair
    hamburger hammer hand hat head heart hedgehog helicopter hen hibiscus hill home honey horse hospital house ice island
    jacket jar jelly jungle kangaroo key king kitchen kite kitten knife knight ladder ladybug lake lamp leaf leg lemon
    leopard letter lighthouse lion lizard lobster lock man map mask meadow melon milk mirror monkey monster moon
    motorcycle mountain mouse mouth mushroom nest night nose nurse oak ocean octopus office onion orange ostrich owl ox
    paint palace palm panda paper parrot pasta peach peacock peak pear pen pencil penguin person phone piano pie pig
    pillow pineapple pirate pizza plane planet plant plate pond pony potato princess pumpkin puppy queen rabbit raccoon
    radio rain rainbow rat ring river road robot rocket roof room rope rose ruler sailor salad sand sandwich scarf school
    scissors sea seal shark sheep shell ship shirt shoe shop skeleton skirt sky snail snake snow snowman soap sock soldier
    soup spider spirit spoon square squirrel stairs star station stone store storm stove strawberry street suitcase sun
    sunflower swan sword table teacher television temple tent tiger toad tomato tooth tower town toy tractor train tree
    truck tulip turkey turtle umbrella unicorn valley van vase village violin volcano wagon wall watch water waterfall
    watermelon whale wheat wheel window witch wolf woman wood worm zebra
    """.split()
)
PHRASES = ("cherry blossom", "pine tree", "palm tree", "ocean wave", "ice cream", "hot dog", "teddy bear", "traffic light")
STYLES = (
    "3d", "anime", "art deco", "baroque", "blueprint", "cartoon", "charcoal", "clay", "comic", "cubist", "cyberpunk",
    "digital art", "embroidery", "engraving", "flat", "fresco", "glass", "graffiti", "halftone", "impressionist", "ink",
    "line art", "low poly", "manga", "minimalist", "mosaic", "neon", "oil painting", "origami", "pastel", "pencil sketch",
    "photographic", "pixel art", "pop art", "realistic", "renaissance", "sepia", "silhouette", "stained glass",
    "surrealist", "twemoji", "ukiyo-e", "vector art", "vintage", "watercolor", "woodcut",
)  # fmt: skip
NAMES = tuple(
    """
    ada adam alice anna ben carl clara david emma eric felix frank george grace harry helen henry hugo ida iris jack jane
    john jonas julia karl kate kira laura leo lily louis lucy maria mark mary max mona nina nora oscar otto paul peter rosa
    ruth sam sara sophie thomas tom victor vera
    """.split()
)
FUNCTION_WORDS = frozenset(
    """
    a about above after against all along among an and any are as at before behind below beneath beside between beyond but by
    down during each for from her his if in inside into is it its like my near no nor not of off on onto or our out outside
    over past some such than that the their them these they this those through to toward under until up upon was were what
    which while who whose with within without you your
    """.split()
)
COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
ADJECTIVES = ("big", "small", "old", "new", "happy", "sad", "beautiful", "wooden", "golden", "shiny")
SCENES = (
    "a photo of a busy street at night",
    "a bowl of fruit on a wooden table",
    "two people walking on the beach",
    "a plate of food with rice and vegetables",
    "a landscape with mountains and a lake",
    "a portrait of a woman",
    "a portrait of a man with glasses",
    "a child playing in the garden",
    "three birds on a branch",
    "an old building in the city",
    "a red car on the road",
    "a glass of water",
    "a kitchen with white walls",
    "a living room with a couch and a lamp",
    "a drawing on white paper",
    "a painting of flowers in a vase",
    "a picture on a blue background",
    "a picture on a black background",
    "a forest in autumn",
    "a snowy mountain under a clear sky",
    "a boat on the sea at sunset",
    "a bridge over a river",
    "a crowd at a concert",
    "a piece of cake on a plate",
    "an astronaut in space",
    "a robot in a factory",
    "a map of an island",
    "a logo of a company",
    "a cup of coffee and a book",
    "a bicycle against a wall",
)
