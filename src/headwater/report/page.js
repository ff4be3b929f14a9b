"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const live = document.body.dataset.live === "yes";
  const chosen = {}, folded = {}, received = {};

  function filter(select) {
    const name = "data-" + select.dataset.filter, value = select.value;
    for (const part of all("[" + name + "]")) part.hidden = value !== "" && part.getAttribute(name) !== value;
  }

  function fold(button, open) {
    button.setAttribute("aria-expanded", String(open));
    for (const row of all('tr[data-group="' + button.dataset.rows + '"]')) row.hidden = !open;
  }

  function dress(root) {
    for (const line of all(".choose", root)) line.hidden = false;
    for (const select of all("select[data-filter]", root)) {
      if (chosen[select.id] !== undefined && all("option", select).some((o) => o.value === chosen[select.id])) select.value = chosen[select.id];
      filter(select);
      select.addEventListener("change", () => { chosen[select.id] = select.value; filter(select); });
    }
    for (const button of all("button.fold", root)) {
      button.hidden = false;
      fold(button, Boolean(folded[button.dataset.rows]));
      button.addEventListener("click", () => {
        folded[button.dataset.rows] = button.getAttribute("aria-expanded") !== "true";
        fold(button, folded[button.dataset.rows]);
      });
    }
  }

  function swap(old, fresh) {
    const opened = all("details[open]", old).map((d) => d.id);
    const stops = "a, button, select, summary, [tabindex]";
    const focused = all(stops, old).indexOf(document.activeElement);
    const aside = all(".scroll", old).map((box) => box.scrollLeft);
    const next = document.importNode(fresh, true);
    for (const id of opened) { const d = next.querySelector("#" + CSS.escape(id)); if (d) d.open = true; }
    old.replaceWith(next);
    dress(next);
    all(".scroll", next).forEach((box, i) => { box.scrollLeft = aside[i] || 0; });
    if (focused >= 0) all(stops, next)[focused]?.focus({ preventScroll: true });
  }

  function update(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const anchor = all("main > section[id]").find((s) => s.getBoundingClientRect().bottom > 0);
    const held = anchor ? [anchor.id, anchor.getBoundingClientRect().top] : null;
    const main = document.getElementById("main");
    const wanted = all("main > section[id]", fresh);
    for (const old of all("main > section[id]")) if (!wanted.some((s) => s.id === old.id)) { old.remove(); delete received[old.id]; }
    wanted.forEach((section, place) => {
      const old = document.getElementById(section.id), html = section.outerHTML;
      if (!old) { main.insertBefore(document.importNode(section, true), main.children[place] || null); dress(main.children[place]); }
      else if (received[section.id] !== html) swap(old, section);
      received[section.id] = html;
    });
    for (const part of [".dated", "nav"]) refresh(part, fresh);
    if (held && document.getElementById(held[0])) window.scrollBy(0, document.getElementById(held[0]).getBoundingClientRect().top - held[1]);
    const big = document.querySelector("#progress .big");
    say(big ? big.textContent : "The study is finished.");
  }

  function refresh(selector, fresh) {
    const old = document.querySelector(selector), next = fresh.querySelector(selector);
    if (old.textContent !== next.textContent) old.replaceWith(document.importNode(next, true));
  }

  function say(text) {
    const news = document.getElementById("news");
    if (news.textContent !== text) news.textContent = text;
  }

  let tag = null, failed = 0;
  async function poll() {
    try {
      const answer = await fetch("/", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) { tag = answer.headers.get("ETag"); update(await answer.text()); }
      failed = 0;
    } catch (error) {
      if (++failed === 3) say("The watch command has ended; this page no longer changes.");
    }
    setTimeout(poll, failed ? 10000 : 5000);
  }

  for (const section of all("main > section[id]")) received[section.id] = section.outerHTML;
  dress(document);
  if (live) setTimeout(poll, 500);
})();
