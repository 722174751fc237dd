// Ask both sides and show their answers as they come. Text from outside is only ever set as textContent.
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const talk = $("talk"), form = $("ask"), field = $("question"), status = $("status");
  const sides = JSON.parse(talk.dataset.sides);
  const words = { new: "the new answer", old: "the old answer", both: "both answers", neither: "neither" };
  let turns = {}, running = null;

  const make = (parent, tag, text, className) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (className) made.className = className;
    return parent.appendChild(made);
  };
  const tell = (text, problem = false) => {
    status.textContent = text;
    status.classList.toggle("problem", problem);
  };
  const busy = controller => {
    running = controller;
    talk.setAttribute("aria-busy", String(!!controller));
    $("send").hidden = $("clear").disabled = !!controller;
    $("stop").hidden = !controller;
  };

  const newTurn = question => {
    const section = $("turn").content.firstElementChild.cloneNode(true);
    section.querySelector("h2").textContent = question;
    const shown = {};
    for (const side of sides) {
      const article = make(section.querySelector(".sides"), "article");
      make(article, "h3", side);
      shown[side] = { article, answer: make(article, "p", "", "answer"), ended: false };
    }
    talk.append(section);
    return { section, shown };
  };
  const end = (side, ending, note = "") => {
    side.article.classList.remove("writing");
    if (side.ended) return;
    side.ended = true;
    const empty = side.answer.textContent ? "" : "an empty answer";
    const shown = { limit: note, stopped: "stopped", problem: note, end: empty }[ending];
    if (shown) make(side.article, "p", shown, `ending ${ending}`);
  };
  const showFacts = (list, facts) => {
    for (const fact of facts) {
      const item = make(list, "li"), line = make(item, "p", `${fact.prompt} `);
      make(line, "span", fact.old || "?", "old");
      line.append(" → ");
      make(line, "span", fact.new || "(forgotten)", "new");
      make(item, "p", Object.entries(fact.says).map(([side, which]) => `${side} says ${words[which]}`).join(", "), "says");
    }
    list.hidden = !facts.length;
  };

  const take = (turn, event) => {
    const side = turn.shown[event.side];
    if (event.waiting) tell("Another question is being answered. Yours waits.");
    else if (event.error) tell(event.error, true);
    else if (event.facts) showFacts(turn.section.querySelector(".touched"), event.facts);
    else if (event.ending) end(side, event.ending, event.note);
    else {
      tell("");
      side.article.classList.add("writing");
      side.answer.textContent += event.text;
    }
  };
  const read = async (response, turn) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
      for (const line of lines) take(turn, JSON.parse(line));
      if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
    }
  };

  const ask = async question => {
    const turn = newTurn(question), controller = new AbortController();
    busy(controller);
    tell("");
    scrollTo(0, document.documentElement.scrollHeight);
    try {
      const body = JSON.stringify({ question, turns });
      const headers = { "Content-Type": "application/json" };
      const response = await fetch("/answer", { method: "POST", headers, body, signal: controller.signal });
      if (response.ok) await read(response, turn);
      else tell((await response.json()).error, true);
    } catch (error) {
      if (!controller.signal.aborted) tell("The server does not answer. Was forgetlearn serve ended?", true);
    }
    for (const side of sides) {
      const text = turn.shown[side].answer.textContent;
      end(turn.shown[side], "stopped");
      if (text) turns[side] = [...(turns[side] || []), question, text]; // a side that did not answer was not asked
    }
    busy(null);
    field.focus();
  };

  form.addEventListener("submit", event => {
    event.preventDefault();
    const question = field.value.trim();
    if (running || !question) return;
    field.value = "";
    ask(question);
  });
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  $("stop").addEventListener("click", () => running && running.abort());
  $("clear").addEventListener("click", () => {
    turns = {};
    talk.replaceChildren();
    tell("");
    field.focus();
  });
})();
