// A conversation with one or several models: what was said, what is sent, and the training row that it makes.
//
// turn: {text, replies: {model: reply}}
// reply: {steps, state, problem, finish, usage, seed, seconds}; state: waiting, streaming, done, stopped or failed
// step: {reasoning, text, calls, results, tokens}: what the model wrote, and the results that it got for its calls

import { stored, store } from "./dom.js";

export const newStep = () => ({ reasoning: "", text: "", calls: [], results: null, tokens: [] });
export const newReply = (seed) => ({ steps: [newStep()], state: "waiting", problem: null, finish: null, usage: null, seed, seconds: 0 });

export const newReplies = () => Object.create(null);  // a model may have any name, __proto__ too

export const conversation = readKept();

function readKept() {
  try {
    const { turns, models } = stored("sessionStorage", "conversation", { turns: [], models: [] });
    const read = turns.map(({ text, replies }) => ({ text: String(text), replies: Object.assign(newReplies(), replies) }));
    for (const reply of read.flatMap((turn) => Object.values(turn.replies))) {
      if (reply.state === "waiting" || reply.state === "streaming") reply.state = "stopped";  // the page was left
      if (!reply.steps.every((step) => typeof step.text === "string" && Array.isArray(step.calls))) throw new Error();
    }
    return { turns: read, models: models.map(String) };
  } catch {  // of another version of the page
    return { turns: [], models: [] };
  }
}

export function keepConversation() {
  if (store("sessionStorage", "conversation", conversation)) return;
  const light = conversation.turns.map((turn) => ({ ...turn, replies: Object.fromEntries(Object.entries(turn.replies)
    .map(([model, reply]) => [model, { ...reply, steps: reply.steps.map((step) => ({ ...step, tokens: [] })) }])) }));
  store("sessionStorage", "conversation", { ...conversation, turns: light });
}

const hasSaid = (reply) => reply && reply.steps.some((step) => step.text || step.calls.length);
const isUsable = (reply) => hasSaid(reply) && ["done", "stopped"].includes(reply.state);

// What to send to a model for the reply to a turn: its own replies so far; where it has none, another model's.
export function messagesFor(model, index, system, history) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (let at = Math.max(0, index - history); at <= index; at += 1) {
    const turn = conversation.turns[at];
    const own = turn.replies[model];
    const reply = at === index || isUsable(own) ? own : Object.values(turn.replies).find(isUsable);
    if (at < index && !reply) continue;  // a turn without a reply
    messages.push({ role: "user", content: turn.text });
    const steps = at === index ? reply.steps.filter((step) => step.results) : reply.steps;
    for (const step of steps) messages.push(...messagesOf(step));
  }
  return messages;
}

function messagesOf(step) {
  if (!step.text && !step.calls.length) return [];
  const said = { role: "assistant", content: step.text };
  if (step.reasoning) said.reasoning_content = step.reasoning;
  if (step.calls.length) {
    said.tool_calls = step.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  }
  const results = step.results ?? [];
  return [said, ...results.map((content, at) => ({ role: "tool", tool_call_id: step.calls[at].id, content }))];
}

// The models that have a finished reply to the last turn.
export function exportable() {
  const last = conversation.turns.at(-1);
  return last ? Object.keys(last.replies).filter((model) => isUsable(last.replies[model])) : [];
}

// The conversation as a row of training data; arguments of calls as JSON values, as templates write them.
export function trainingRow(model, system, tools) {
  const messages = messagesFor(model, conversation.turns.length - 1, system, Infinity);
  messages.push(...conversation.turns.at(-1).replies[model].steps.filter((step) => !step.results).flatMap(messagesOf));
  for (const message of messages) {
    for (const call of message.tool_calls ?? []) {
      try {
        call.function.arguments = JSON.parse(call.function.arguments);
      } catch {  // stays the text that the model wrote
      }
    }
  }
  return tools ? { messages, tools } : { messages };
}
