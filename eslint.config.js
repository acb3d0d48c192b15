// @ts-check
// Lint rules of the page's JavaScript; `make lint` runs them, and tsc checks the types.

import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: ["**/node_modules/", ".venv/", ".harness-venv/", "build/", "htmlcov/", "runs/"] },
  js.configs.recommended,
  {
    rules: {
      "array-callback-return": "error",
      complexity: ["error", 12],
      eqeqeq: "error",
      "max-depth": ["error", 3],
      "max-lines": ["error", 450],
      "max-lines-per-function": ["error", 60],
      "max-params": ["error", 5],
      "no-else-return": "error",
      "no-implicit-coercion": ["error", { boolean: true, number: true, string: true }],
      "no-param-reassign": "error",
      "no-shadow": "error",
      "no-unused-vars": ["error", { ignoreRestSiblings: true }],
      "no-use-before-define": ["error", { functions: false }],
      "no-useless-return": "error",
      "no-var": "error",
      "object-shorthand": "error",
      "prefer-const": "error",
      "prefer-template": "error",
    },
  },
  { files: ["ipmerge_core/**/*.js"], languageOptions: { globals: globals.browser } },
  { files: ["tests/js/**/*.js"], languageOptions: { globals: globals.node } },
];
