"""Draw small talk in English and Chinese: greetings, thanks, goodbyes, and questions about the model itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.demo.tasks import HELD_OUT_EACH, Task, Words, normalize_question


@dataclass(frozen=True, slots=True)
class Language:
    """The same small talk in one language.

    Attributes:
        greetings, about_itself: answer -> what people write to get it, the commonest first.
        addressees: what may follow a greeting.
        openings: what may come before a question.
        endings: punctuation after a greeting.
    """

    greetings: Mapping[str, Sequence[str]]
    about_itself: Mapping[str, Sequence[str]]
    addressees: Sequence[str]
    openings: Sequence[str]
    endings: Sequence[str]


ENGLISH = Language(
    greetings={
        "Hello! Ask me a question.": ["Hi", "Hello", "Hey", "Hi there", "Hello there", "Hey there", "Hello hello",
                                      "Greetings", "Good day", "Nice to meet you", "Howdy", "Hi hi"],
        "Good morning!": ["Good morning", "Morning", "A good morning", "Hello and good morning"],
        "Good afternoon!": ["Good afternoon", "Hello and good afternoon"],
        "Good evening!": ["Good evening", "Evening", "Hello and good evening"],
        "Good night!": ["Good night", "Night", "Good night and sleep well", "Sleep well"],
        "I am well, thank you.": ["How are you?", "How are you doing?", "How do you do?", "How is it going?",
                                  "Are you well?", "How are you today?", "How's it going?", "How do you feel?"],
        "You are welcome!": ["Thanks", "Thank you", "Thank you very much", "Many thanks", "Thanks a lot", "Thx",
                             "Thank you so much", "Great, thanks", "OK thanks", "Thanks for your help", "Cheers"],
        "Glad to help.": ["Great", "Well done", "Good", "Nice", "OK", "Cool", "Very good", "Right", "Correct", "Wow",
                          "Good job", "Good answer", "That is right", "Perfect", "Okay", "Yes"],
        "Goodbye!": ["Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good bye", "Farewell", "OK bye",
                     "See you tomorrow", "I have to go", "Thanks and bye", "Quit", "Exit"],
    },
    about_itself={
        "I am a small model, trained just now on your machine.": [
            "Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "Who am I talking to?",
            "Who is this?", "What kind of model are you?", "Describe yourself.", "Which model are you?", "Who r u?",
            "What model is this?", "Say something about yourself.", "Who is there?", "What is this?",
            "Who are you really?", "Can you introduce yourself?", "What are you exactly?"],
        "I have no name.": [
            "What is your name?", "What's your name?", "Do you have a name?", "What should I call you?",
            "What are you called?", "How should I call you?", "Your name?", "Tell me your name.", "Name?",
            "May I know your name?", "What do people call you?"],
        "No person, only a small language model.": [
            "Are you a person?", "Are you human?", "Are you a human?", "Are you real?", "Are you a robot?",
            "Are you an AI?", "Are you alive?", "Are you a machine?", "Are you a bot?", "Are you a real person?",
            "Are you a computer?", "Are you a language model?", "Am I talking to a person?", "Are you ChatGPT?"],
        "You trained me, just now.": [
            "Who made you?", "Who trained you?", "Where do you come from?", "Who created you?", "Who built you?",
            "How were you made?", "Who is your maker?", "Where are you from?", "When were you trained?",
            "Who developed you?", "How old are you?", "When were you made?"],
        "I can sort, count, compare, copy and translate.": [
            "What can you do?", "Help", "What do you know?", "What can I ask you?", "How can you help me?",
            "What are you able to do?", "What questions can I ask?", "What are you good at?", "Can you help me?",
            "Help me", "What can I ask?", "What else can you do?", "What are your skills?"],
    },
    addressees=[" again", " my friend", ", model", " friend", " little model", " everyone", " to you", " dear",
                " today"],
    openings=["Hello. ", "Hi! ", "Please tell me: ", "One question: ", "Good morning. ", "Hi, ", "Hey, ",
              "Tell me, ", "Excuse me, ", "So, ", "And ", "OK. ", "Thanks. ", "Hello, "],
    endings=["", "", "!", "."],
)  # fmt: skip
CHINESE = Language(
    greetings={
        "你好！请问我问题。": ["你好", "您好", "嗨", "你好呀", "你好啊", "哈喽", "大家好", "嗨你好", "你好你好", "喂"],
        "早上好！": ["早上好", "早安", "早", "早啊", "你好，早上好"],
        "下午好！": ["下午好", "你好，下午好"],
        "晚上好！": ["晚上好", "你好，晚上好"],
        "晚安！": ["晚安", "好梦", "去睡了，晚安"],
        "我很好，谢谢。": ["你好吗？", "最近怎么样？", "你怎么样？", "近来可好？", "你还好吗？", "过得好吗？",
                           "今天好吗？"],
        "不客气！": ["谢谢", "多谢", "谢谢你", "非常感谢", "感谢", "谢谢您", "太谢谢了", "好的，谢谢", "谢了",
                      "十分感谢"],
        "很高兴帮到你。": ["真棒", "很好", "不错", "好的", "厉害", "对", "对了", "好", "真好", "答对了", "太好了",
                          "是的"],
        "再见！": ["再见", "拜拜", "回头见", "明天见", "下次见", "再会", "走了", "我走了", "好的，再见", "谢谢，再见"],
    },
    about_itself={
        "我是一个小模型，刚刚在你的电脑上训练出来。": [
            "你是谁？", "你是什么？", "介绍一下你自己。", "请介绍自己。", "你是什么模型？", "我在和谁说话？",
            "说说你自己。", "自我介绍一下。", "你是哪个模型？", "你究竟是谁？", "这是谁？", "你到底是谁？", "您是谁？"],
        "我没有名字。": [
            "你叫什么名字？", "你叫什么？", "你的名字是什么？", "你有名字吗？", "我该怎么叫你？", "怎么称呼你？",
            "你的名字？", "请问你的名字？", "您贵姓？"],
        "我不是人，是一个小语言模型。": [
            "你是人吗？", "你是机器人吗？", "你是真人吗？", "你是人还是机器？", "你是人工智能吗？", "你是活的吗？",
            "你是不是人？", "你是机器吗？", "你是电脑吗？"],
        "是你刚刚训练了我。": [
            "谁做了你？", "谁训练了你？", "你从哪里来？", "谁创造了你？", "你是谁做的？", "你是怎么来的？",
            "你是谁训练的？", "你多大了？", "你几岁了？", "你来自哪里？"],
        "我会排序、数数、比大小、重复和翻译。": [
            "你会什么？", "你能做什么？", "帮助", "我可以问什么？", "你会做什么？", "你有什么用？", "能帮我吗？",
            "你还会什么？", "你知道什么？", "我能问你什么？", "帮帮我"],
    },
    addressees=["呀", "啊", "，小模型", "，朋友", "，我的朋友", "，模型", "哦", "，老朋友"],
    openings=["你好，", "请问，", "早上好。", "告诉我，", "请告诉我，", "那么，", "我想知道，", "嗨，", "你好！",
              "好的，", "谢谢。", "我问你，"],
    endings=["", "", "！", "。"],
)  # fmt: skip


def greet(rng: random.Random, words: Words) -> Task:
    language = ENGLISH if rng.random() < 0.6 else CHINESE
    answer = rng.choice(list(language.greetings))
    phrase = _pick_common(rng, language.greetings[answer])
    question = phrase.rstrip("?？") + (rng.choice(language.addressees) if rng.random() < _COMBINED else "")
    question += phrase[-1] if phrase[-1] in "?？" else rng.choice(language.endings)
    return Task("greetings", question, answer, cue="", is_open=False)


def who_are_you(rng: random.Random, words: Words) -> Task:
    language = ENGLISH if rng.random() < 0.6 else CHINESE
    answer = rng.choice(list(language.about_itself))
    opening = rng.choice(language.openings) if rng.random() < _COMBINED else ""
    question = opening + _pick_common(rng, language.about_itself[answer])
    return Task("who are you", question, answer, cue="", is_open=False)


def _pick_common(rng: random.Random, phrases: Sequence[str]) -> str:
    """A phrase; the earlier in the list, the more often."""
    return phrases[rng.randrange(rng.randint(1, len(phrases)))]


TALK: dict[str, Callable[[random.Random, Words], Task]] = {"greetings": greet, "who are you": who_are_you}
_PLAIN = frozenset(
    normalize_question(phrase)
    for language in (ENGLISH, CHINESE)
    for answers in (language.greetings, language.about_itself)
    for phrases in answers.values()
    for phrase in phrases
)
_HELD_OUT_SEED = 13
_COMBINED = 0.5  # how often an addressee or an opening is added


def draw_held_out_talk() -> dict[str, list[Task]]:
    """Combinations to hold out in any spelling, such as a greeting with an addressee; each part alone is trained."""
    rng = random.Random(_HELD_OUT_SEED)
    drawn: dict[str, list[Task]] = {}
    for kind, draw in TALK.items():
        found: dict[str, Task] = {}
        while len(found) < HELD_OUT_EACH:
            task = draw(rng, Words())
            if normalize_question(task.question) not in _PLAIN:
                found.setdefault(normalize_question(task.question), task)
        drawn[kind] = list(found.values())
    return drawn
