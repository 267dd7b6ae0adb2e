"""The words of examples/shapes.py: colours, shapes, places, wordings, and text-only questions."""

from __future__ import annotations

# English -> Chinese
COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形"}
PLACES = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上", "右上", "左下", "右下"),
}
YES_NO = {"en": ("no", "yes"), "zh": ("没有", "有")}
SAME = {"en": ("no", "yes"), "zh": ("不同", "相同")}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {
        "en": ("What color is the object?", "Which color do you see?", "Name the color."),
        "zh": ("这个物体是什么颜色？", "你看到什么颜色？", "说出颜色。"),
    },
    "color of": {
        "en": ("What color is the {shape}?", "Which color has the {shape}?"),
        "zh": ("{shape}是什么颜色？", "图中的{shape}是哪种颜色？"),
    },
    "shape": {
        "en": ("What shape is the object?", "Which shape do you see?", "Name the shape."),
        "zh": ("这个物体是什么形状？", "你看到什么形状？", "说出形状。"),
    },
    "shape of": {
        "en": ("What shape is the {color} one?", "Which shape is {color}?"),
        "zh": ("{color}的是什么形状？", "哪种形状是{color}的？"),
    },
    "count": {
        "en": ("How many objects are there?", "How many shapes do you see?", "Count the objects."),
        "zh": ("图中有几个物体？", "一共有几个形状？", "数一数有几个。"),
    },
    "count color": {
        "en": ("How many {color} objects are there?", "How many are {color}?"),
        "zh": ("有几个{color}的物体？", "{color}的有几个？"),
    },
    "place": {
        "en": ("Where is the {thing}?", "In which corner is the {thing}?"),
        "zh": ("{thing}在哪里？", "{thing}在哪个角？"),
    },
    "presence": {
        "en": ("Is there a {thing}?", "Do you see a {thing}?"),
        "zh": ("有{thing}吗？", "图中有没有{thing}？"),
    },
    "what": {
        "en": ("What is in the picture?", "What do you see?", "Describe the picture."),
        "zh": ("图中是什么？", "你看到了什么？", "描述这张图。"),
    },
    "list": {
        "en": ("What is in the picture?", "What do you see?", "Describe the picture.", "List the objects."),
        "zh": ("图中是什么？", "你看到了什么？", "描述这张图。", "列出所有物体。"),
    },
    "same color": {
        "en": ("Do both pictures show the same color?", "Is the color the same in both?"),
        "zh": ("两张图的颜色相同吗？", "两个物体的颜色一样吗？"),
    },
    "same shape": {
        "en": ("Do both pictures show the same shape?", "Is the shape the same in both?"),
        "zh": ("两张图的形状相同吗？", "两个物体的形状一样吗？"),
    },
    "number": {
        "en": ("What is in picture {number}?", "What does picture {number} show?"),
        "zh": ("第{number}张图是什么？", "图{number}里是什么？"),
    },
    "next": {
        "en": ("What comes after {number}?", "Which number follows {number}?"),
        "zh": ("{number}后面是几？", "{number}的下一个数是几？"),
    },
    "badge": {
        "en": ("Which badge is this?", "What is the code of this badge?", "Read the badge."),
        "zh": ("这是哪个徽章？", "这个徽章的代码是什么？", "读出徽章。"),
    },
}

# A made-up taste, best first: what the preference pairs of examples/preferences.py are about.
TASTE = {
    "color": ("red", "yellow", "purple", "green", "blue", "black"),
    "shape": ("circle", "triangle", "cross", "square"),
}
ASK_TASTE = {
    "color": {
        "en": ("Pick a color for the {thing}.", "Which color suits a {thing}?", "A color for my {thing}?"),
        "zh": ("给{thing}选一个颜色。", "什么颜色适合{thing}？", "我的{thing}用什么颜色？"),
    },
    "shape": {
        "en": ("Pick a shape for the {thing}.", "Which shape suits a {thing}?", "A shape for my {thing}?"),
        "zh": ("给{thing}选一个形状。", "什么形状适合{thing}？", "我的{thing}用什么形状？"),
    },
}
# The last ones stand in held-out pairs only.
THINGS = {
    "en": "door box cup table wall plate bed car house bag lamp book roof hat boat sign".split(),
    "zh": "门 盒子 杯子 桌子 墙 盘子 床 车 房子 包 灯 书 屋顶 帽子 船 牌子".split(),
}
HELD_OUT_THINGS = 4

OPPOSITES = {
    "en": "big small, hot cold, up down, left right, day night, old new, fast slow, light dark, open closed, "
    "long short, full empty, high low, rich poor, happy sad, early late, hard soft, wet dry, strong weak, "
    "thick thin, loud quiet, first last, good bad, clean dirty, near far, win lose, push pull, buy sell",
    "zh": "大 小, 热 冷, 上 下, 左 右, 白天 黑夜, 旧 新, 快 慢, 亮 暗, 开 关, 长 短, 满 空, 高 低, 富 穷, "
    "早 晚, 硬 软, 湿 干, 强 弱, 厚 薄, 好 坏, 近 远, 买 卖, 多 少, 胖 瘦, 前 后, 内 外, 真 假, 轻 重",
}
FACTS = {
    "en": {
        "Hello!": "Hello! How can I help?",
        "Hi!": "Hello! How can I help?",
        "Who are you?": "I am a tiny model.",
        "What can you do?": "I can see shapes and colors.",
        "Thank you!": "You are welcome.",
        "Goodbye!": "Goodbye!",
        "What color is the sky?": "blue",
        "What color is grass?": "green",
        "What color is snow?": "white",
        "What color is blood?": "red",
        "What color is coal?": "black",
        "What color is a lemon?": "yellow",
        "How many legs has a cat?": "4",
        "How many legs has a bird?": "2",
        "How many legs has a spider?": "8",
        "How many sides has a triangle?": "3",
        "How many sides has a square?": "4",
        "How many days has a week?": "7",
        "How many months has a year?": "12",
        "How many hours has a day?": "24",
        "What is the capital of France?": "Paris",
        "What is the capital of China?": "Beijing",
        "What is the capital of Japan?": "Tokyo",
        "What is the capital of Italy?": "Rome",
        "What is the capital of Spain?": "Madrid",
        "What is the capital of Germany?": "Berlin",
        "What does a cow give?": "milk",
        "What do bees make?": "honey",
        "What is frozen water?": "ice",
        "Which season follows summer?": "autumn",
        "Which day follows Monday?": "Tuesday",
        "Where do fish live?": "in water",
    },
    "zh": {
        "你好！": "你好！有什么可以帮你？",
        "您好！": "你好！有什么可以帮你？",
        "你是谁？": "我是一个小模型。",
        "你能做什么？": "我能看形状和颜色。",
        "谢谢！": "不客气。",
        "再见！": "再见！",
        "天空是什么颜色？": "蓝色",
        "草是什么颜色？": "绿色",
        "雪是什么颜色？": "白色",
        "血是什么颜色？": "红色",
        "煤是什么颜色？": "黑色",
        "柠檬是什么颜色？": "黄色",
        "猫有几条腿？": "4",
        "鸟有几条腿？": "2",
        "蜘蛛有几条腿？": "8",
        "三角形有几条边？": "3",
        "正方形有几条边？": "4",
        "一周有几天？": "7",
        "一年有几个月？": "12",
        "一天有几个小时？": "24",
        "法国的首都是哪里？": "巴黎",
        "中国的首都是哪里？": "北京",
        "日本的首都是哪里？": "东京",
        "意大利的首都是哪里？": "罗马",
        "西班牙的首都是哪里？": "马德里",
        "德国的首都是哪里？": "柏林",
        "奶牛产什么？": "牛奶",
        "蜜蜂酿什么？": "蜂蜜",
        "水结冰变成什么？": "冰",
        "夏天之后是什么季节？": "秋天",
        "星期一之后是星期几？": "星期二",
        "鱼住在哪里？": "水里",
    },
}
ASK_OPPOSITE = {"en": "What is the opposite of {}?", "zh": "{}的反义词是什么？"}


def _text_pairs(language: str) -> list[tuple[str, str]]:
    """Facts and opposites, both ways, as (question, answer)."""
    words = [pair.split() for pair in OPPOSITES[language].split(", ")]
    ask = ASK_OPPOSITE[language]
    both_ways = [(ask.format(a), b) for a, b in words] + [(ask.format(b), a) for a, b in words]
    return [*FACTS[language].items(), *both_ways]


TEXT_PAIRS = {language: _text_pairs(language) for language in ("en", "zh")}
