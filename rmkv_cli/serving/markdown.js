"use strict";
// Markdown to DOM nodes. Words only ever become text nodes, so that no answer can add an element or run a script.

const DEPTH = 8;  // levels of lists and quotes; deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEADING = /^(#{1,6}) +(.*)/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
// Bounded lengths keep the time linear, whatever the text.
const INLINE = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`{1,3})(?!`)(?<code>[^\n]{1,1000}?)(?<!`)\k<ticks>(?!`)/,
  /\*\*(?=\S)(?<strong>[^\n]{1,1000}?)(?<=\S)\*\*/,
  /(?<![\w*])\*(?=[^\s*])(?<star>[^\n]{1,1000}?)(?<=[^\s*])\*(?![\w*])/,
  /(?<!\w)_(?=[^\s_])(?<underscore>[^\n]{1,1000}?)(?<=[^\s_])_(?!\w)/,
  /\[(?<label>[^\]\n]{1,1000})\]\((?<target>[^\s)]{1,2000})\)/,
  /<(?<angled>https?:\/\/[^\s<>]{1,2000})>/,
  /(?<bare>\bhttps?:\/\/[^\s<>"'`]{0,2000}[^\s<>"'`.,;:!?)\]*_])/,
].map((part) => part.source).join("|"), "g");

function make(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

// Return a link, or null for an address that is not of the web.
function link(target, children) {
  const url = URL.canParse(target) ? new URL(target) : null;
  if (!["http:", "https:"].includes(url?.protocol)) return null;
  const made = make("a", ...children);
  Object.assign(made, {href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer"});
  return made;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const {0: whole, index, groups: {escaped, code, strong, star, underscore, label, target, angled, bare}} of text.matchAll(INLINE)) {
    const emphasized = star ?? underscore, address = angled ?? bare;
    const node =
      escaped ?? (code !== undefined ? make("code", code.replace(/^ (.*[^ ].*) $/, "$1"))
      : strong !== undefined ? make("strong", ...inline(strong))
      : emphasized !== undefined ? make("em", ...inline(emphasized))
      : label !== undefined ? link(target, inline(label)) : link(address, [address]));
    if (node === null) continue;
    nodes.push(text.slice(end, index), node);
    end = index + whole.length;
  }
  return [...nodes, text.slice(end)];
}

// Return the number of lines from `start` on that `belongs` accepts.
function run(lines, start, belongs) {
  let end = start;
  while (end < lines.length && belongs(lines[end], end)) end++;
  return end - start;
}

function list(lines, depth) {
  const [{length: width}, indent, marker] = lines[0].match(ITEM), ordered = /\d/.test(marker), items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length + 1) items.push([line.slice(item[0].length)]);
    else items.at(-1).push(line.slice(Math.min(width, line.search(/\S|$/))));
  }
  const made = make(ordered ? "ol" : "ul", ...items.map((item) => {
    const parts = blocks(item, depth + 1);
    return make("li", ...(parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts));
  }));
  if (ordered) made.start = parseInt(marker);
  return made;
}

function blocks(lines, depth = 0) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i], fence = line.match(FENCE)?.[1], heading = line.match(HEADING), nests = depth < DEPTH;
    let count = 1;
    if (fence) {
      const closes = (other) => other.trim().startsWith(fence) && new Set(other.trim()).size === 1;
      count = 1 + run(lines, i + 1, (other) => !closes(other));
      found.push(make("pre", make("code", lines.slice(i + 1, i + count).join("\n"))));
      count += 1;  // the closing fence
    } else if (heading) {
      found.push(make(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
    } else if (RULE.test(line)) {
      found.push(make("hr"));
    } else if (nests && QUOTE.test(line)) {
      count = run(lines, i, (other) => QUOTE.test(other));
      found.push(make("blockquote", ...blocks(lines.slice(i, i + count).map((other) => other.replace(/^ {0,3}> ?/, "")), depth + 1)));
    } else if (nests && ITEM.test(line)) {
      const indent = line.match(ITEM)[1].length;
      const ordered = /^ *\d/.test(line);
      // An empty line belongs to the list if the list continues after it.
      const belongs = (other) => /^ {2}/.test(other.slice(indent)) || (ITEM.test(other) && /^ *\d/.test(other) === ordered);
      count = run(lines, i, (other, at) => belongs(other) || (!other.trim() && at + 1 < lines.length && belongs(lines[at + 1])));
      found.push(list(lines.slice(i, i + count), depth));
    } else if (line.trim()) {
      const starts = (other) => FENCE.test(other) || HEADING.test(other) || (nests && (QUOTE.test(other) || ITEM.test(other)));
      count = 1 + run(lines, i + 1, (other) => other.trim() && !starts(other));
      found.push(make("p", ...inline(lines.slice(i, i + count).join("\n"))));
    }
    i += count;
  }
  return found;
}

// Return the nodes of a text.
function markdown(text) {
  return blocks(text.split("\n"));
}
